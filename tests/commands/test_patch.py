"""`pack` and `run PATCH`: the publisher's exact bytes on a copy of the base, or a refusal before a byte is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result
from tests.killing import contents

Cli = Callable[..., Result]


@pytest.fixture
def base(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "publisher" / "base"))


@pytest.fixture
def download(demo: Path, tmp_path: Path) -> Path:
    """The user's copy of the base, under another name and with a file of its own."""
    copy = Path(shutil.copytree(demo, tmp_path / "user" / "my-download"))
    (copy / "notes.txt").write_text("mine")
    return copy


def edited(cli: Cli, base: Path, kind: str, demo_text: Path) -> Path:
    out = base.parent / "out"
    if kind == "drop":
        done = cli("drop-experts", base, "--keep", "0,2,3,5", "--max-shard-size", "2MB", "-o", out)
    elif kind == "refit":
        options = ["--count", "2", "--text", demo_text, "--tokens", "2048", "--window", "128", "--no-heldout"]
        done = cli("drop-experts", base, *options, "--by", "reap", "--refit", "down", "-o", out)
    else:
        other = base.parent / "other"
        assert cli("rescale", base, "--top-k", "2", "--scale", "1.1", "-o", other).code == 0
        recipe = base.parent / "merge.yaml"
        recipe.write_text(
            f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: [{{model: {base}}}, {{model: {other}}}]\n"
        )
        done = cli("merge", recipe, "-o", out)
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize("kind", ["drop", "refit", "merge"])
def test_a_patch_gives_the_publishers_bytes(
    cli: Cli, base: Path, download: Path, tmp_path: Path, demo: Path, kind: str
) -> None:
    out = edited(cli, base, kind, demo.parent / "heldout-code.txt")
    models = ["--model", f"base={base}"]
    theirs = ["--model", f"base={download}"]
    if kind == "merge":
        shutil.copytree(base.parent / "other", tmp_path / "user" / "second")
        models += ["--model", f"other={base.parent / 'other'}"]
        theirs += ["--model", f"other={tmp_path / 'user' / 'second'}"]
    packed = cli("pack", out, *models, "-o", tmp_path / "patch", "--json")
    assert packed.code == 0, packed.err
    published = contents(out)
    shutil.rmtree(base.parent)  # nothing of the publisher's is there any more
    run = cli("run", tmp_path / "patch", *theirs, "-o", tmp_path / "mine")
    assert run.code == 0, run.err
    assert contents(tmp_path / "mine") == published
    if kind == "drop":
        assert packed.json["bytes"] < 100_000


def test_a_base_with_one_byte_changed_is_refused(cli: Cli, base: Path, download: Path, tmp_path: Path) -> None:
    out = edited(cli, base, "drop", base)
    assert cli("pack", out, "--model", base, "-o", tmp_path / "patch").code == 0
    shard = next(download.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    run = cli("run", tmp_path / "patch", "--model", download, "-o", tmp_path / "mine")
    assert run.code == 2
    assert f"the SHA-256 of {shard.name}" in run.err
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / "mine.partial").exists()


def test_another_model_is_refused(cli: Cli, base: Path, tmp_path: Path) -> None:
    out = edited(cli, base, "drop", base)
    assert cli("pack", out, "--model", base, "-o", tmp_path / "patch").code == 0
    run = cli("run", tmp_path / "patch", "--model", out, "-o", tmp_path / "mine")
    assert run.code == 2
    assert "not those of the model that was edited" in run.err
    assert not list(tmp_path.glob("mine*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.update(schema_version=2), "schema version"),
        (lambda patch: patch.update(outputs=[{"file": "../x", "size": 1, "sha256": "0" * 64}]), "leads elsewhere"),
        (lambda patch: patch.update(outputs=[{"file": "x", "size": 1, "sha256": "0"}]), "no size and SHA-256"),
        (lambda patch: patch.update(inputs=3), "lacks what a patch says"),
        (lambda patch: patch["record"].pop("recipe"), "holds no recipe"),
    ],
)
def test_broken_patches(
    cli: Cli, base: Path, tmp_path: Path, change: Callable[[dict[str, object]], object], said: str
) -> None:
    out = edited(cli, base, "drop", base)
    assert cli("pack", out, "--model", base, "-o", tmp_path / "patch").code == 0
    manifest = tmp_path / "patch" / "patch.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    run = cli("run", tmp_path / "patch", "--model", base, "-o", tmp_path / "mine")
    assert run.code == 2
    assert said in run.err
    assert not list(tmp_path.glob("mine*"))


def test_a_changed_file_of_a_patch_is_refused(cli: Cli, base: Path, tmp_path: Path, demo: Path) -> None:
    out = edited(cli, base, "refit", demo.parent / "heldout-code.txt")
    assert cli("pack", out, "--model", base, "-o", tmp_path / "patch").code == 0
    repair = max((tmp_path / "patch" / "files").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(repair.read_bytes())
    data[-1] ^= 1
    repair.write_bytes(data)
    run = cli("run", tmp_path / "patch", "--model", base, "-o", tmp_path / "mine")
    assert run.code == 2
    assert "is not the file that the patch was made with" in run.err


def test_options_that_would_give_other_bytes_are_refused(cli: Cli, base: Path, tmp_path: Path) -> None:
    out = edited(cli, base, "drop", base)
    assert cli("pack", out, "--model", base, "-o", tmp_path / "patch").code == 0
    run = cli("run", tmp_path / "patch", "--model", base, "--card", "-o", tmp_path / "mine")
    assert run.code == 2
    assert "--card is not for a patch" in run.err
    assert "steps:" in cli("run", tmp_path / "patch", "--print-recipe").out
    assert cli("run", tmp_path / "patch", "-o", tmp_path / "mine").code == 2
    assert cli("pack", base, "--model", base, "-o", tmp_path / "second").code == 2
