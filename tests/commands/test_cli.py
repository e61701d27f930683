"""The command line as a process: what it imports, its streams, its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moesurgery
from moesurgery.cli._app import app
from moesurgery.escape import safe
from tests.conftest import ROOT, Result

Cli = Callable[..., Result]
SCRIPT = Path(sys.executable).parent / "moesurgery"


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def commands() -> list[str]:
    return sorted(c.name or "" for c in app().registered_commands)


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_start_imports_nothing_heavy(command: str) -> None:
    program = (
        "import sys\nfrom moesurgery.cli import main\n"
        f"main([{command!r}])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["count-params", "MODEL"],
        ["rescale", "MODEL", "--top-k", "3", "-o", "OUT"],
        ["rescale", "MODEL", "--top-k", "3", "--dry-run"],
        ["schema"],
        ["recipes", "ls"],
    ],
)
def test_no_torch_where_no_arithmetic_needs_it(arguments: list[str], demo: Path, tmp_path: Path) -> None:
    words = [str(demo) if a == "MODEL" else str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    program = (
        f"import sys\nfrom moesurgery.cli import main\nassert main({words!r}) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_imports_no_other() -> None:
    program = (
        "import sys\nfrom moesurgery.cli import main\nassert main(['drop-experts', '--help']) == 0\n"
        "names = {name.removeprefix('moesurgery.') for name in sys.modules}\n"
        "assert 'surgery.drop_experts' in names\n"
        "assert not {'surgery.upcycle', 'surgery.tie_blocks', 'cli.probe', 'cli.validate', 'merge.recipe'} & names"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "moesurgery", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"moesurgery {moesurgery.__version__}")


def test_a_wrong_command_is_answered_with_the_nearest() -> None:
    done = process("resclae", "model")
    assert done.returncode == 2
    assert "'rescale'" in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    assert process("--version").stdout.strip() == f"moesurgery {moesurgery.__version__}"


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help(command: str) -> None:
    done = process(command, "--help", GITHUB_ACTIONS="true")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing", "--help"]),
        (["rescale", "--top-q", "3"], ["--top-q", "rescale --help"]),
        (["rescale", ".", "--top-k"], ["--top-k"]),
        (["rescale", ROOT / "examples/demo/model"], ["--top-k", "rescale --help"]),
        (["count-params", "/no/such/place"], ["no such directory"]),
        (["count-params", "acme/model"], ["hf://acme/model"]),
        (["count-params", ROOT / "README.md"], ["is a file"]),
        (["count-params", ROOT / "examples/demo/model", "--accelerator", "abacus"], ["abacus", "h100"]),
    ],
)
def test_bad_usage_is_one_clear_message(arguments: list[object], words: list[str]) -> None:
    done = process(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


def test_help_lists_words_and_bounds_of_options_that_may_be_left_out() -> None:
    text = " ".join(process("upcycle", "--help").stdout.split())
    assert "random, clusters" in text
    assert "float32, bfloat16, float16" in text
    assert "carries. [0<=x<=1]" in text


def test_json_is_one_document_on_stdout(demo: Path, tmp_path: Path) -> None:
    for arguments in (
        ["count-params", demo, "--json"],
        ["rescale", demo, "--top-k", 3, "--json", "--dry-run", "-o", tmp_path / "x"],
        ["rescale", demo, "--top-k", 3, "--json", "-o", tmp_path / "out"],
    ):
        done = process(*arguments)
        assert done.returncode == 0
        assert json.loads(done.stdout)["schema_version"] == 1
        assert done.stderr == ""


def test_dry_run_writes_nothing_and_says_what_would_happen(demo: Path, tmp_path: Path, ok: Cli) -> None:
    result = ok("rescale", demo, "--top-k", 3, "--dry-run", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert "48 computed" in result.out
    assert "num_experts_per_tok: 2 -> 3" in result.out
    assert "free" in result.out


def test_quiet_prints_the_result_only(demo: Path, tmp_path: Path) -> None:
    done = process("rescale", demo, "--top-k", 3, "-q", "-o", tmp_path / "out")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_a_closed_pipe_is_no_error_message(demo: Path) -> None:
    done = subprocess.run(
        f"{SCRIPT} count-params {demo} --by-layer | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_no_colour_in_a_pipe_and_colour_on_request(demo: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    plain = subprocess.run([SCRIPT, "count-params", demo], capture_output=True, text=True, env=environment)
    assert "\x1b" not in plain.stdout
    environment["FORCE_COLOR"] = "1"
    coloured = subprocess.run([SCRIPT, "count-params", demo], capture_output=True, text=True, env=environment)
    assert "\x1b[1m" in coloured.stdout


def test_hostile_names_are_shown_escaped() -> None:
    assert safe("a\x1b[2Jb\u202ec\r") == "a\\x1b[2Jb\\u202ec\\r"
    assert safe("größe [/bold red] 名") == "größe [/bold red] 名"


def test_a_bug_is_reported_in_one_line(cli: Cli, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("moesurgery.cli.count_params.recognise", broken)
    result = cli("count-params", demo)
    assert result.code == 2
    assert "bug in moesurgery: ZeroDivisionError: oops" in result.err


def test_default_model_is_here(demo: Path, ok: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    assert ok("count-params", "--json").json["num_experts"] == 8


# Perplexity


def test_perplexity_equals_a_loop_over_windows(demo: Path, ok: Cli, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    from tests.tiny import load

    text = tmp_path / "t.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 60 + "\f\nclass A:\n    pass\n" * 40)
    found = ok("perplexity", demo, text, "--window", 64, "--json").json["domains"][0]
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    ids = []
    for document in text.read_text().split("\f"):
        ids += [0, *tokenizer.encode(document.strip("\n"), add_special_tokens=False).ids]
    model, total, count = load(demo), 0.0, 0
    for start in range(0, len(ids) // 64 * 64, 64):
        window = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            logp = model(window).logits[0].log_softmax(-1)
        for i in range(63):
            total -= logp[i, window[0, i + 1]].item()
            count += 1
    assert found["tokens"] == count
    assert found["nats"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--window", 5000], "2048 positions"),
        (["--dtype", "int8"], "float32"),
        (["--window", 2000], "less than one window"),
    ],
)
def test_perplexity_refuses(demo: Path, cli: Cli, tmp_path: Path, arguments: list[object], word: str) -> None:
    (tmp_path / "t.txt").write_text("short")
    result = cli("perplexity", demo, tmp_path / "t.txt", *arguments)
    assert result.code == 2
    assert word in result.err


def test_perplexity_of_half_a_model_is_refused(demo: Path, cli: Cli, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(demo, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    result = cli("perplexity", model, demo.parent / "heldout-code.txt", "--limit", 1)
    assert result.code == 2
    assert re.search(r"tensors are missing", result.err)
