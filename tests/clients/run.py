"""Let every client read what every operation writes: `make clients`.

The checkpoints are those of `cases`; each client runs in an environment of its own under the folder given, and gives
log-probabilities, which are compared with those of transformers 5 on the same file. What is kept stands in
results.json beside this file, from which docs/clients.md and docs/pairs.md are made. Exit 1 where a client reads an
input and not what we made of it, without our having said so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from moesurgery import open_checkpoint, plan_of  # noqa: E402
from moesurgery.families.clients import CLIENTS  # noqa: E402
from moesurgery.surgery.client_form import obstacles  # noqa: E402
from moesurgery.surgery.convert import unread_layout  # noqa: E402
from tests.clients.cases import Case, cases, prompt  # noqa: E402

RESULTS = HERE / "results.json"
READERS = {
    "transformers5": "read_transformers.py",
    "transformers4": "read_transformers.py",
    "llama.cpp": "read_llama_cpp.py",
    "mlx": "read_mlx.py",
    "vllm": "read_vllm.py",
}
REFERENCE = "transformers5"
HALF = ("", "bf16", "rescale", "merge", "upcycle-mixtral", "upcycle-qwen3_moe")  # what llama.cpp runs in BF16 too
GGUF_HALF = "llama.cpp-bf16"
TOLERANCE = 5e-5  # of log-probabilities, in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="environments and results")
    parser.add_argument("--clients", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--only", default="", help="cases in whose name this regular expression is found")
    parser.add_argument("--summarise", action="store_true", help="run nothing: take the answers that are there")
    given = parser.parse_args()
    folder = given.folder.resolve()
    made = [case for case in cases(folder / "models") if re.search(given.only, case.name)]
    wanted = list(dict.fromkeys([REFERENCE, *given.clients]))
    half = [case for case in made if case.operation in HALF]
    if not given.summarise:
        for client in wanted:
            run(client, folder, made)
        if "llama.cpp" in wanted:
            run("llama.cpp", folder, half, kind="bf16")
    answers = {client: {case.name: answer(folder, client, case) for case in made} for client in wanted}
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "cases": {}}
    for client in wanted:
        version = folder / "answers" / client / "version"
        if version.exists():
            kept["versions"][client] = version.read_text()
    for case in made:
        row = kept["cases"].setdefault(case.name, {"clients": {}})
        row.update(origin=case.origin, operation=case.operation, model_type=model_type(case))
        for client in wanted:
            if (found := answers[client][case.name]) is not None:
                row["clients"][client] = compared(found, answers[REFERENCE][case.name])
        if case in half and "llama.cpp" in wanted:
            readings = (answers[REFERENCE][case.name], answers["llama.cpp"][case.name], answer(folder, GGUF_HALF, case))
            row["perplexity"] = [perplexity(reading) for reading in readings]
    wrong = [text for case in made for text in judged(case, kept["cases"], wanted)]
    kept["cases"] = dict(sorted(kept["cases"].items()))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    for line in wrong:
        print(line)
    print(f"{len(made)} checkpoints, {len(wanted)} clients, {len(wrong)} not read as their input is")
    return 1 if wrong else 0


def model_type(case: Case) -> str:
    found: str = json.loads((case.path / "config.json").read_text())["model_type"]
    return found


Answer = numpy.ndarray | str


def run(client: str, folder: Path, made: list[Case], kind: str = "f32") -> None:
    """Run a client on cases; its answers, log-probabilities [tokens, vocabulary] or its words, go into files."""
    out = folder / "answers" / (client if kind == "f32" else GGUF_HALF)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    job = out / "job.json"
    models = {case.name: str(case.path) for case in made}
    job.write_text(json.dumps({"models": models, "tokens": prompt(), "out": str(out)}))
    environment = {
        **os.environ,
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "MOESURGERY_NODE": str(folder / "node"),
        "MOESURGERY_LLAMA_CPP": str(folder / "llama.cpp-source"),
        "MOESURGERY_GGUF": kind,
    }
    python = folder / client / "bin" / "python"
    with (out / "log").open("w") as log:
        subprocess.run([python, HERE / READERS[client], job], env=environment, stdout=log, stderr=log, check=False)


def answer(folder: Path, client: str, case: Case) -> Answer | None:
    """Return a client's answer; None where it never came to this case."""
    at = folder / "answers" / client / case.name
    if Path(f"{at}.npy").exists():
        found: numpy.ndarray = numpy.load(f"{at}.npy")
        return found
    error = Path(f"{at}.error")
    return error.read_text() if error.exists() else None


def compared(found: Answer, reference: Answer | None) -> float | str:
    """Return the largest difference of log-probabilities, or the client's words."""
    if isinstance(found, str):
        return " ".join(found.split())[:200]
    if reference is None or isinstance(reference, str):
        return "transformers 5 does not read it"
    if found.shape != reference.shape:
        return f"logits of shape {list(found.shape)}"
    difference = float(numpy.abs(found - reference).max())
    return float(f"{difference:.1e}") if numpy.isfinite(difference) else "NaN"


def perplexity(found: Answer | None) -> float | None:
    if found is None or isinstance(found, str):
        return None
    tokens = prompt()
    rows = found[numpy.arange(len(tokens) - 1), tokens[1:]]
    return round(float(numpy.exp(-rows.mean())), 4)


def agrees(value: float | str) -> bool:
    return isinstance(value, float) and value <= TOLERANCE


def judged(case: Case, rows: dict[str, Any], clients: list[str]) -> list[str]:
    """Say where a client reads the input, and not what was made of it, though we did not say so."""
    row, origin = rows[case.name], rows.get(case.origin)
    plan = plan_of(open_checkpoint(case.path))
    found = []
    row["said"] = {}
    for client in CLIENTS:
        said = obstacles(CLIENTS[client], plan, plan.config)
        if client in unread_layout(plan):
            said = [*said, "it does not read this layout"]
        if said:
            row["said"][client] = "; ".join(said)
        if client not in clients or client not in row["clients"]:
            continue
        good = agrees(row["clients"][client])
        before = origin is not None and agrees(origin["clients"].get(client, "not run"))
        if before and not good and not said:
            found.append(f"{client}: {case.name}: {row['clients'][client]}")
        if said and good:
            found.append(f"{client}: {case.name}: read rightly, though we say: {'; '.join(said)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
