"""Loss and divergence of checkpoints and of recipes never written, against transformers' own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Result
from tests.tiny import load

Cli = Callable[..., Result]


@pytest.fixture
def texts(demo: Path) -> list[Path]:
    return [demo.parent / "heldout-code.txt", demo.parent / "heldout-manual.txt"]


def write_recipe(path: Path, model: Path, **step: Any) -> Path:
    path.write_text(json.dumps({"model": str(model), "steps": [{"rescale": step}]}))
    return path


def windows_of(model: Path, text: Path, count: int, length: int) -> torch.Tensor:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    start = json.loads((model / "config.json").read_text())["bos_token_id"]
    ids: list[int] = []
    for document in text.read_text().split("\f"):
        ids += [start, *tokenizer.encode(document.strip("\n"), add_special_tokens=False).ids]
    return torch.tensor(ids[: count * length]).view(count, length)


def log_probabilities(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(w[None]).logits[:, :-1].double().log_softmax(-1) for w in windows])


def test_loss_and_divergence_by_transformers(demo: Path, texts: list[Path], tmp_path: Path, ok: Cli) -> None:
    ok("rescale", demo, "--top-k", 3, "-o", tmp_path / "top3", "-q")
    options = ["--window", 64, "--limit", 3, "--json"]
    found = ok("compare", demo, tmp_path / "top3", "--text", texts[0], "--text", texts[1], *options).json
    base, other = load(demo), load(tmp_path / "top3")
    for i, text in enumerate(texts):
        windows = windows_of(demo, text, 3, 64)
        p, q = log_probabilities(base, windows), log_probabilities(other, windows)
        entry = found["models"][1]["domains"][i]
        assert entry["nats"] == pytest.approx(
            torch.nn.functional.nll_loss(q.flatten(0, 1), windows[:, 1:].flatten()).item(), abs=1e-5
        )
        assert entry["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
        assert entry["tokens"] == 3 * 63
        assert "kl" not in found["models"][0]["domains"][i]


def test_a_recipe_gives_the_figures_of_its_written_checkpoint(
    demo: Path, texts: list[Path], tmp_path: Path, ok: Cli
) -> None:
    recipe = write_recipe(tmp_path / "top3.yaml", demo, top_k=3)
    ok("run", recipe, "-o", tmp_path / "top3", "-q")
    options = ["--text", texts[0], "--window", 64, "--limit", 2, "--json"]
    found = ok("compare", tmp_path / "top3", recipe, *options).json["models"]
    assert found[0]["domains"][0]["nats"] == found[1]["domains"][0]["nats"]
    assert found[1]["domains"][0]["kl"] == 0
    for model in (tmp_path / "top3", recipe):
        alone = ok("perplexity", model, texts[0], "--window", 64, "--limit", 2, "--json").json
        assert alone["domains"][0]["nats"] == found[0]["domains"][0]["nats"]


def test_the_table_has_a_row_per_model(demo: Path, texts: list[Path], tmp_path: Path, ok: Cli) -> None:
    recipe = write_recipe(tmp_path / "loud.yaml", demo, top_k=2, scale=2.0)
    result = ok("compare", demo, recipe, "--text", texts[0], "--window", 64, "--limit", 1)
    header, first, second = result.out.splitlines()
    assert header.split() == ["model", "heldout-code", "over", "the", "first", "KL"]
    assert first.split()[0] == "model"
    assert second.split()[0] == "loud.yaml"
    assert float(second.split()[-1]) > 0
    assert "rescale: top-k 2 -> 2" in result.err


def test_token_ids_and_text_in_json_lines(demo: Path, texts: list[Path], tmp_path: Path, ok: Cli) -> None:
    windows = windows_of(demo, texts[0], 4, 64).flatten().tolist()
    forms = {
        "ids": [{"input_ids": windows[:100]}, {"input_ids": windows[100:]}],
        "bare": [windows],
        "padded": [{"input_ids": [0, 0, *windows, 0], "attention_mask": [0, 0, *[1] * len(windows), 0]}],
        "text": [{"text": part.strip("\n")} for part in texts[0].read_text().split("\f")],
    }
    options = ["--window", 64, "--limit", 4, "--json"]
    expected = ok("perplexity", demo, texts[0], *options).json["domains"][0]["nats"]
    for name, lines in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        assert ok("perplexity", demo, path, *options).json["domains"][0]["nats"] == expected, name


def test_separators_and_marks_that_editors_leave(demo: Path, texts: list[Path], tmp_path: Path, ok: Cli) -> None:
    """A byte order mark is no text, and U+2028 and its like end no line of JSON."""
    text = texts[0].read_text().replace("\f", " ")
    options = ["--window", 64, "--limit", 4, "--json"]
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    plain, marked = (ok("perplexity", demo, tmp_path / f"{n}.txt", *options).json for n in ("plain", "marked"))
    assert marked["domains"][0]["nats"] == plain["domains"][0]["nats"]
    odd = text[:40] + "\u2028\u0085" + text[40:]
    (tmp_path / "odd.txt").write_text(odd)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + "\n")
    first, second = (ok("perplexity", demo, tmp_path / f"odd.{end}", *options).json for end in ("txt", "jsonl"))
    assert first["domains"][0]["nats"] == second["domains"][0]["nats"]


def test_token_ids_of_another_tokenizer_are_named(demo: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps([1, 2, 999_999, 3]) + "\n")
    result = cli("perplexity", demo, tmp_path / "ids.jsonl", "--window", 4)
    assert result.code == 2
    assert "ids.jsonl has the token 999999, and the model has" in result.err
    assert "hint:  the tokenizer that made it is another model's" in result.err


def test_text_in_another_encoding_gets_a_hint(demo: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "t.txt").write_bytes("café".encode("latin-1"))
    result = cli("perplexity", demo, tmp_path / "t.txt")
    assert result.code == 2
    assert "t.txt cannot be read: it is not UTF-8 text" in result.err
    assert "iconv" in result.err


def test_a_seed_draws_other_windows(demo: Path, texts: list[Path], ok: Cli) -> None:
    options = ["--window", 64, "--limit", 2, "--json"]
    nats = [
        ok("perplexity", demo, texts[0], *options, *seed).json["domains"][0]["nats"]
        for seed in ([], ["--seed", 0], ["--seed", 0], ["--seed", 1])
    ]
    assert nats[1] == nats[2]
    assert len(set(nats)) == 3


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"text": 3}', "neither text nor token ids"),
        ("[1, -2]", "neither"),
        ("[1, true]", "neither"),
        ("{", "not JSON"),
        ('{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}', "attention_mask is no list of 3"),
        ('{"input_ids": [1, 2, 3], "attention_mask": 1}', "attention_mask is no list of 3"),
    ],
)
def test_bad_lines_are_named(demo: Path, tmp_path: Path, cli: Cli, line: str, word: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    result = cli("perplexity", demo, tmp_path / "t.jsonl")
    assert result.code == 2
    assert "t.jsonl:2" in result.err
    assert word in result.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["compare", "MODEL", "--text", "TEXT"], "two models"),
        (["compare", "MODEL", "MODEL", "--text", "TEXT", "--device", "abacus"], "abacus"),
        (["compare", "MODEL", "MODEL", "--text", "TEXT", "--device", "cuda:99"], "no such device"),
        (["compare", "MODEL", "OTHER", "--text", "TEXT", "--window", "32", "--limit", "1"], "different vocabularies"),
        (["compare", "MODEL", "MODEL"], "--text"),
    ],
)
def test_what_compare_refuses(
    demo: Path, texts: list[Path], models: Any, cli: Cli, arguments: list[str], word: str
) -> None:
    names = {"MODEL": demo, "TEXT": texts[0], "OTHER": models("mixtral")}
    result = cli(*(names.get(a, a) for a in arguments))
    assert result.code == 2
    assert word in result.err
