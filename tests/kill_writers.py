"""Kills every writer, with every flag, at any step it takes on the disk: `python -m tests.kill_writers FOLDER [KILLS]`.

Each time a writer and its flags are drawn: with or without an old output under `--force`, on a filesystem that can
exchange two names at once or on one that cannot, perhaps after an unfinished job of another recipe, and half of the
time in the last steps, which publish. The command
is killed in the middle of a step, half of the time in its second run as well. Then

* there is the whole old output or the whole new one, never neither, and never anything else under its name. (Where
  names cannot be exchanged the old one may be beside it, until the next run.)
* no input has changed, and nothing that `validate` lets pass is wrong,
* the same command finishes the work to the same bytes and modes, and nothing is left beside the output or in it.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moesurgery.cli import main as command
from moesurgery.validate.check import CHECKS
from moesurgery.validate.check_architecture import check_architecture
from moesurgery.write import publish
from tests.killing import contents, in_a_process, passes, weights, wreck
from tests.tiny import save_tiny

FLAGS = ("--no-fsync", "--link", "--card", "--checksums", "--max-shard-size=60KB")
LAST = 40  # steps, about, from the exchange of names on


class Writer(NamedTuple):
    """A command without its output; `flags`: whether it has those that other writers share."""

    name: str
    arguments: list[str]
    flags: bool = True


class Trial(NamedTuple):
    """A writer with flags, and what it makes: the bytes and modes of everything in its output, and its steps."""

    writer: Writer
    arguments: list[str]
    force: bool
    exchanges: bool
    expected: dict[str, tuple[int, bytes]]
    steps: int


def writers(folder: Path) -> list[Writer]:
    """Make small models in `folder`, and return what is done to them."""
    for name, model_type, fused in (("mixture", "mixtral", False), ("fused", "mixtral", True), ("dense", "mistral", 0)):
        save_tiny(model_type, folder / name, fused=bool(fused))
    save_tiny("mixtral", folder / "other", rms_norm_eps=1e-6)
    other = json.loads((folder / "other/config.json").read_text())
    (folder / "other/config.json").write_text(json.dumps({**other, "rms_norm_eps": 1e-5}))
    mixture, fused_, dense, tuned = (str(folder / name) for name in ("mixture", "fused", "dense", "tuned"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {mixture}\nsteps:\n  - drop-experts: {{experts: [1]}}\n  - rescale: {{top_k: 1}}\n")
    merge = folder / "merge.yaml"
    merge.write_text(
        f"models:\n  - {{model: {mixture}, parameters: {{weight: 0.7}}}}\n  - {{model: {fused_}, parameters: "
        "{weight: 0.3}}\nmerge_method: linear\ndtype: float32\n"
    )
    shutil.copytree(mixture, tuned)
    _scale_attention(Path(tuned))
    return [
        Writer("rescale", ["rescale", mixture, "--top-k", "1", "--scale", "1.5"]),
        Writer("rescale the config", ["rescale", mixture, "--top-k", "1", "--scale", "none"]),
        Writer("convert the dtype", ["convert", mixture, "--dtype", "bf16"]),
        Writer("convert the layout", ["convert", mixture, "--layout", "fused"]),
        Writer("convert nothing", ["convert", fused_]),
        Writer("drop-experts", ["drop-experts", mixture, "--experts", "1"]),
        Writer("merge-experts", ["merge-experts", mixture, "--to", "2"]),
        Writer("upcycle", ["upcycle", dense, "--experts", "2"]),
        Writer("to-dense", ["to-dense", mixture, "--expert", "0"]),
        Writer("add-expert", ["add-expert", mixture, "--source", fused_]),
        Writer("tie-blocks", ["tie-blocks", mixture, "--group-size", "2", "--init", "average"]),
        Writer("run", ["run", str(recipe)]),
        Writer("merge", ["merge", str(merge)]),
        Writer("extract-lora", ["extract-lora", mixture, tuned, "--rank", "2"], flags=False),
    ]


def _scale_attention(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 1.25 if "q_proj" in n else t for n, t in tensors.items()}, file, metadata={"format": "pt"})


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of a folder and all that is in it."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(p.relative_to(folder)): (p.stat().st_mode, b"" if p.is_dir() else p.read_bytes()) for p in paths}


def prepare(out: Path, old: Path, force: bool) -> None:
    """Leave `out` as it is before a run: absent, or the old output."""
    for left in out.parent.iterdir():
        wreck(left)
    if force:
        shutil.copytree(old, out)


def draw(chosen: random.Random, writer: Writer, out: Path, old: Path, made: dict[Any, Trial]) -> Trial:
    """Draw flags for a writer, and run it undisturbed where that was not done with these flags."""
    force = writer.flags and chosen.random() < 0.6
    exchanges = not force or chosen.random() < 0.7
    given = [flag for flag in FLAGS if writer.flags and chosen.random() < (0.6 if flag == "--no-fsync" else 0.2)]
    if writer.flags:
        given += ["--force"] * force + ["-j", chosen.choice("12")]
    arguments = [*writer.arguments, "-q", "-o", str(out), *given]
    key = (*arguments, exchanges)
    if key not in made:
        prepare(out, old, force)
        code, steps = attempt(arguments, None, exchanges)
        assert code == 0, f"{arguments}: exit {code}"
        made[key] = Trial(writer, arguments, force, exchanges, everything(out), steps)
        assert [p.name for p in out.parent.iterdir()] == [out.name], f"{arguments}: something is left behind"
    return made[key]


def attempt(arguments: list[str], last: int | None, exchanges: bool) -> tuple[int, int]:
    """Run a command in a fork, killed in its step `last`; return its exit status and the steps it took."""
    possible = publish._rename_with_flags
    publish._rename_with_flags = possible if exchanges else None
    try:
        return in_a_process(arguments, last, "killed")
    finally:
        publish._rename_with_flags = possible


def begin_another(chosen: random.Random, given: list[Writer], out: Path) -> bool:
    """Leave an unfinished job of another recipe beside the old output; return False where it got too far."""
    other = chosen.choice([writer for writer in given if writer.flags])
    before = everything(out)
    attempt([*other.arguments, "-q", "-o", str(out), "--force", "--no-fsync"], chosen.randint(1, 60), True)
    return everything(out) == before and {path.name for path in out.parent.iterdir()} <= {
        out.name,
        f"{out.name}.partial",
    }


def kill(
    trial: Trial,
    chosen: random.Random,
    given: list[Writer],
    out: Path,
    old: Path,
    expected_old: dict[str, tuple[int, bytes]],
) -> str:
    """Kill a command once or twice and see what is left; then let it finish. Return which output was there."""
    prepare(out, old, trial.force)
    if trial.force and chosen.random() < 0.3 and not begin_another(chosen, given, out):
        prepare(out, old, trial.force)
    first = max(1, trial.steps - LAST) if chosen.random() < 0.5 else 1
    killed = [chosen.randint(first, trial.steps) for _ in range(chosen.choice((1, 1, 2)))]
    where = f"{trial.arguments} {'' if trial.exchanges else 'without exchange '}killed at {killed} of {trial.steps}"
    state = ""
    for step in killed:
        code, _ = attempt(trial.arguments, step, trial.exchanges)
        assert code in (-9, 0, 2), f"{where}: exit {code}"
        state = state_of(trial, out, expected_old, where)
        for left in out.parent.iterdir():
            if left != out and left.is_dir() and passes(left):
                found = weights(contents(left))
                right = [weights({n: data for n, (_, data) in w.items()}) for w in (trial.expected, expected_old)]
                assert found in right, f"{where}: {left.name} passes and is wrong"
    whole = state == "new"
    code, _ = attempt(trial.arguments, None, trial.exchanges)
    wanted = 2 if whole and not trial.force else 0  # it is there and needs nothing but to be tidied up
    assert code == wanted, f"{where}: the same command ends with exit {code}"
    assert everything(out) == trial.expected, f"{where}: finished to something else"
    assert [p.name for p in out.parent.iterdir()] == [out.name], f"{where}: something is left beside the output"
    return state


def state_of(trial: Trial, out: Path, expected_old: dict[str, tuple[int, bytes]], where: str) -> str:
    """Say what is under the output's name after a kill: "old", "new" or "nothing"."""
    if not out.exists():
        assert not trial.force or not trial.exchanges, f"{where}: neither the old output nor the new one is there"
        if trial.force:
            (aside,) = out.parent.glob(f"{out.name}.replaced-*")
            assert everything(aside) == expected_old, f"{where}: the old output is gone"
        return "nothing"
    found = {name: what for name, what in everything(out).items() if name.split("/")[0] != ".moesurgery"}
    assert found in (expected_old, trial.expected), f"{where}: under the output's name is neither old nor new"
    return "old" if found == expected_old else "new"


def main(folder: Path, kills: int, seed: int = 0) -> None:
    torch.set_num_threads(1)  # imported here once, and without threads that a fork would lack
    CHECKS[:] = [
        check for check in CHECKS if check.function is not check_architecture
    ]  # it is slow, and not about bytes
    models, place, old = folder / "models", folder / "place", folder / "old"
    models.mkdir(parents=True)
    place.mkdir()
    save_tiny("mixtral", old, num_hidden_layers=1)
    given = writers(models)
    before, expected_old = everything(models), everything(old)
    chosen, made, counts, start = random.Random(seed), {}, Counter[str](), time.monotonic()
    for writer in given:  # here, so that forks need not import everything again
        assert command([*writer.arguments, "-q", "-o", str(place / "out")]) == 0, writer.name
        wreck(place / "out")
    for number in range(kills):
        writer = given[number % len(given)]
        trial = draw(chosen, writer, place / "out", old, made)
        state = kill(trial, chosen, given, place / "out", old, expected_old)
        assert everything(models) == before, f"{trial.arguments}: an input has changed"
        flags = [argument for argument in trial.arguments if argument in FLAGS]
        how = "without an old output" if not trial.force else "exchanged" if trial.exchanges else "renamed twice"
        counts.update([f"{how}: {state}", *flags])
    print(f"{kills} kills of {len(given)} writers in {len(made)} combinations, {time.monotonic() - start:.0f} s")
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000, *map(int, sys.argv[3:4]))
