"""What people type instead of what is meant: each gets a sentence that says what to type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Result
from tests.tiny import read_config, read_tensors

Cli = Callable[..., Result]
MODEL = ROOT / "examples" / "demo" / "model"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(60))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["drop-experts", MODEL, "--experts", "1", "--count", "2"], ["experts and count are given", "--keep 25%"]),
        (["drop-experts", MODEL], ["which experts, or how many"]),
        (
            ["drop-experts", MODEL, "--experts", "{0: [3], 1: [6]}"],
            ["in every MoE layer", "nothing is said of the MoE layers 2, 3"],
        ),
        (["drop-experts", MODEL, "--experts", "6-0"], ["the range 6-0 ends before it begins", "0-6"]),
        (["drop-experts", MODEL, "--experts", "0-99999999"], ["more than 100,000"]),
        (["drop-experts", MODEL, "--experts", "first"], ["'first' is not a list of whole numbers, as 0-6,9"]),
        (["drop-experts", MODEL, "--keep", "most"], ["keep is 'most'", "25%"]),
        (["drop-experts", MODEL, "--keep", "0%"], ["keep is '0%'"]),
        (["drop-experts", MODEL, "--keep", "125%"], ["keep is '125%'"]),
        (["count-params", "https://huggingface.co/acme/model"], ["page of the Hub", "hf://acme/model"]),
        (["count-params", "huggingface.co/acme/model"], ["page of the Hub", "hf://acme/model"]),
        (["count-params", "https://huggingface.co/acme/m/tree/v2"], ["hf://acme/m@v2"]),
        (["count-params", "https://huggingface.co/datasets/acme/text"], ["no model", "hf://org/name"]),
        (["count-params", "hf:/acme/model"], ["write hf://acme/model"]),
        (["count-params", "hf:acme/model"], ["write hf://acme/model"]),
        (["count-params", str(MODEL) + "s"], [f"did you mean {MODEL}?"]),
        (["run", "rescale-top3"], ["recipe that ships", "recipes show rescale-top3 > rescale-top3.yaml"]),
        (["run", "rescale-top3.yaml"], ["recipes show rescale-top3 > rescale-top3.yaml"]),
        (["merge", "merge/linear"], ["recipe that ships", "recipes show merge/linear > linear.yaml"]),
        (["run", "-"], ["not from standard input"]),
        (["run", MODEL], ["is a folder"]),
        (["run", ROOT / "recipes" / "rescale-top.yaml"], ["did you mean", "rescale-top3.yaml"]),
    ],
    ids=lambda words: " ".join(map(str, words[:4])).replace(str(ROOT), "")[:60],
)
def test_the_message_says_what_to_type(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    for word in words:
        assert word in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_a_file_of_gguf(cli: Cli, gguf: Path) -> None:
    for place in (gguf, next(gguf.iterdir())):
        result = cli("rescale", place, "--top-k", 2)
        assert result.code == 2
        assert "is a GGUF of version 0" in result.err


def test_ranges_and_shares_are_the_numbers_that_they_stand_for(ok: Cli, tmp_path: Path) -> None:
    plain, ranged, shared, counted = (tmp_path / name for name in ("plain", "ranged", "shared", "counted"))
    ok("drop-experts", MODEL, "--experts", "0,1,2,5", "-o", plain)
    ok("drop-experts", MODEL, "--experts", "0-2,5", "-o", ranged)
    assert read_config(ranged) == read_config(plain)
    left, right = read_tensors(plain), read_tensors(ranged)
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    ok("drop-experts", MODEL, "--keep", "25%", "-o", shared)
    ok("drop-experts", MODEL, "--keep", "2", "-o", counted)
    assert read_config(shared)["num_local_experts"] == 2
    left, right = read_tensors(shared), read_tensors(counted)
    assert all(left[name].equal(right[name]) for name in right)
    listed = ok("drop-experts", MODEL, "--keep", "0-1,4", "--dry-run", "--json").json["steps"][0]["report"]["layers"]
    assert [layer["kept"] for layer in listed] == [[0, 1, 4]] * 6
    per_layer = ok(
        "drop-experts",
        MODEL,
        "--experts",
        "{0: 0-1, 1: [0-1], 2: [6-7], 3: [2, 4], 4: 0-1, 5: 0-1}",
        "--dry-run",
        "--json",
    )
    assert per_layer.json["steps"][0]["report"]["layers"][2]["dropped"] == [6, 7]
