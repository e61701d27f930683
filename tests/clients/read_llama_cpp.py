"""Read checkpoints with llama.cpp, for `tests/clients/run.py`: its converter makes a GGUF, node-llama-cpp runs it.

The converter knows tokenizers by the hash of what they do; ours is of no published model, so its pre-tokenizer is
said to be GPT-2's. Tokens are given by number, so that nothing of the tokenizer is used but its size.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from reading import read_all

NODE = Path(os.environ["MOESURGERY_NODE"])  # the folder with node_modules
SOURCES = os.environ["MOESURGERY_LLAMA_CPP"]  # llama.cpp as node-llama-cpp ships it
KIND = os.environ.get("MOESURGERY_GGUF", "f32")
sys.path[:0] = [SOURCES, f"{SOURCES}/gguf-py"]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def logprobs(path: Path, tokens: list[int]) -> numpy.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        gguf, said, answer = (Path(folder, name) for name in ("model.gguf", "said", "answer.json"))
        child = multiprocessing.get_context("fork").Process(target=convert, args=(path, gguf, said))
        child.start()
        child.join()
        if child.exitcode:
            raise ValueError(f"the converter: {last_lines(said.read_text())}")
        script = Path(__file__).with_name("read_gguf.mjs")
        command = ["node", str(script), str(NODE), str(gguf), json.dumps(tokens), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(last_lines(done.stderr + done.stdout))
        rows = numpy.array(json.loads(answer.read_text()), dtype=numpy.float64)
    with numpy.errstate(divide="ignore"):
        return numpy.log(rows)


def convert(path: Path, gguf: Path, said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["convert_hf_to_gguf.py", str(path), "--outfile", str(gguf), "--outtype", KIND]
        convert_hf_to_gguf.main()


def last_lines(text: str) -> str:
    """Return the end of what a program said, without its trace of calls."""
    lines = [line.strip() for line in text.splitlines()]
    calls = ("at ", "File ", "throw ", "^", "Node.js", "file:", "~~")
    return "; ".join([line for line in lines if line and not line.startswith(calls)][-4:])[-500:]


def version() -> str:
    package = json.loads((NODE / "node_modules/node-llama-cpp/package.json").read_text())["version"]
    release = json.loads((NODE / "node_modules/node-llama-cpp/llama/binariesGithubRelease.json").read_text())["release"]
    return f"llama.cpp {release} (node-llama-cpp {package})"


if __name__ == "__main__":
    read_all(logprobs, version())
