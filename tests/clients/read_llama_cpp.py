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
from typing import Any

import numpy

NODE = Path(os.environ["MOESURGERY_NODE"])  # the folder with node_modules
SOURCES = os.environ["MOESURGERY_LLAMA_CPP"]  # llama.cpp as node-llama-cpp ships it
KIND = os.environ.get("MOESURGERY_GGUF", "f32")
sys.path[:0] = [SOURCES, f"{SOURCES}/gguf-py"]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def read_job(job: dict[str, Any]) -> None:
    """Convert all models, then let one process run them: `NAME.npy`, or why not in `NAME.error`."""
    out = Path(job["out"])
    (out / "version").write_text(version())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, path in job["models"].items():
            child = multiprocessing.get_context("fork").Process(target=convert, args=(path, folder / model))
            child.start()
            child.join()
            if child.exitcode:
                said = last_lines((folder / f"{model}.said").read_text())
                (out / f"{model}.error").write_text(f"the converter: {said}")
        command = ["node", str(Path(__file__).with_name("read_gguf.mjs")), str(NODE), name, json.dumps(job["tokens"])]
        while waiting := [path.stem for path in sorted(folder.glob("*.gguf"))]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for model in waiting:
                answer = folder / f"{model}.json"
                if answer.exists():
                    rows = numpy.array(json.loads(answer.read_text()), dtype=numpy.float64)
                    with numpy.errstate(divide="ignore"):
                        numpy.save(out / f"{model}.npy", numpy.log(rows))
                else:  # an assertion of llama.cpp ends the process: the others are run by another
                    (out / f"{model}.error").write_text(last_lines(done.stderr + done.stdout) or "it stopped")
                (folder / f"{model}.gguf").unlink()
                if not answer.exists():
                    break


def convert(path: str, to: Path) -> None:
    with Path(f"{to}.said").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ["convert_hf_to_gguf.py", path, "--outfile", f"{to}.part", "--outtype", KIND]
        convert_hf_to_gguf.main()
    Path(f"{to}.part").rename(f"{to}.gguf")


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
    read_job(json.loads(Path(sys.argv[1]).read_text()))
