"""What outputs are called, where they lie, what a dry run says beside one, and who may read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import DEMO, Result

Cli = Callable[..., Result]
Models = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["rescale", DEMO, "--top-k", 3], "model-rescale-k3"),
        (["drop-experts", DEMO, "--count", 2], "model-drop-2of8"),
        (["merge-experts", DEMO, "--to", 4], "model-merge-8to4"),
        (["add-expert", DEMO, "--source", DEMO, "--experts", "0-2"], "model-add-3to8"),
        (["tie-blocks", DEMO, "--blocks", "0,1,0,1,4,5"], "model-tie-4of6"),
        (["to-dense", DEMO, "--expert", 3], "model-to-dense-3"),
        (["convert", DEMO, "--layout", "fused", "--dtype", "float16"], "model-convert-fused-float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_output_is_called_after_what_was_done(ok: Cli, arguments: list[object], name: str) -> None:
    assert ok(*arguments, "--dry-run", "--json").json["output"] == name


def test_an_upcycle_says_how_many_experts(ok: Cli, models: Models, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    found = ok("upcycle", tmp_path / "dense", "--experts", 8, "--dry-run", "--json").json["output"]
    assert found == "dense-upcycle-8x"


def test_a_dry_run_beside_an_existing_output(ok: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("rescale", DEMO, "--top-k", 3, "-o", out)
    tried = ok("rescale", DEMO, "--top-k", 4, "-o", out, "--dry-run", "--json")
    assert tried.json["output_exists"]
    assert "warning: " in tried.err
    assert "--force" in tried.err
    assert ok("rescale", DEMO, "--top-k", 4, "-o", out, "--dry-run", "--force").err == ""


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_the_rights_of_every_file_follow_the_umask(ok: Cli, tmp_path: Path, umask: int) -> None:
    ok("rescale", DEMO, "--top-k", 3, "-o", tmp_path / "edited")
    ok("extract-lora", DEMO, tmp_path / "edited", "--rank", 1, "-o", tmp_path / "adapter")
    for path in tmp_path.rglob("*"):
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path
