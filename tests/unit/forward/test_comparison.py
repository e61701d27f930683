"""How far models are apart, token by token: by hand, and by a loop over transformers' own forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moesurgery import open_checkpoint
from moesurgery.errors import CheckpointError
from moesurgery.forward import loss as loss_module
from moesurgery.forward.bootstrap import interval
from moesurgery.forward.generation import loops
from moesurgery.forward.loss import token_figures
from moesurgery.forward.token_classes import end_tokens, kind_of_text
from tests.conftest import Result
from tests.quantise import rewrite
from tests.tiny import load, read_tensors
from tests.unit.forward.test_loss import log_probabilities, windows_of, write_recipe

Cli = Callable[..., Result]


def test_two_tokens_by_hand() -> None:
    """Two predicted tokens of a vocabulary of two: p = (.5, .5), then (.9, .1); q = (.25, .75), then (.8, .2)."""
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]).log()
    logits = torch.tensor([[0.25, 0.75], [0.8, 0.2], [0.5, 0.5]]).log()
    found = token_figures(logits, reference, torch.tensor([0, 1, 0]))
    np.testing.assert_allclose(found.nats, [-math.log(0.75), -math.log(0.8)], rtol=1e-6)
    divergence = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.5)]
    np.testing.assert_allclose(found.divergence, divergence, rtol=1e-5)
    np.testing.assert_allclose(found.overlap, [0.75, 0.9], rtol=1e-6)
    assert found.agreement is not None
    assert found.agreement[1] == 1
    other = token_figures(logits, torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]).log(), torch.tensor([0, 1, 0]))
    assert other.agreement is not None
    assert other.agreement.tolist() == [0, 0]
    alone = token_figures(logits, None, torch.tensor([0, 1, 0]))
    assert alone.divergence is alone.agreement is alone.overlap is None


def test_windows_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_ROWS", 4)  # parts that end within windows of five
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    ids = torch.randint(7, (3, 5), generator=generator)
    found = token_figures(logits, reference, ids)
    for row in range(3):
        one = token_figures(logits[row], reference[row], ids[row])
        for name in ("nats", "divergence", "agreement", "overlap"):
            np.testing.assert_array_equal(getattr(found.of(row), name), getattr(one, name))
    by_hand = -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(found.nats, by_hand, rtol=1e-5)


def test_figures_by_a_loop_over_transformers(demo: Path, tmp_path: Path, ok: Cli) -> None:
    texts = [demo.parent / "heldout-code.txt", demo.parent / "heldout-manual.txt"]
    ok("drop-experts", demo, "--count", 3, "-o", tmp_path / "dropped", "-q")
    arguments = ["compare", demo, tmp_path / "dropped", "--text", texts[0], "--text", texts[1]]
    model = ok(*arguments, "--window", 64, "--limit", 3, "--json").json["models"][1]
    base, other = load(demo), load(tmp_path / "dropped")
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    by_class: dict[str, list[float]] = {}
    by_window = []
    for i, text in enumerate(texts):
        windows = windows_of(demo, text, 3, 64)
        p, q = log_probabilities(base, windows), log_probabilities(other, windows)
        same, overlap = [], []
        for w in range(3):
            over = 0.0
            for t in range(63):
                same.append(float(p[w, t].argmax() == q[w, t].argmax()))
                overlap.append(
                    sum(min(a, b) for a, b in zip(p[w, t].exp().tolist(), q[w, t].exp().tolist(), strict=True))
                )
                target = int(windows[w, t + 1])
                over += float(p[w, t, target] - q[w, t, target])
                kind = kind_of_text(tokenizer.decode([target], skip_special_tokens=False))
                by_class.setdefault(kind, []).append(float((p[w, t].exp() * (p[w, t] - q[w, t])).sum()))
            by_window.append((over / 63, i, w))
        entry = model["domains"][i]
        assert entry["agreement"] == pytest.approx(np.mean(same), abs=1e-9)
        assert entry["overlap"] == pytest.approx(np.mean(overlap), abs=1e-5)
        assert entry["interval"][0] <= entry["over"] <= entry["interval"][1]
    for entry in model["classes"]:
        assert entry["tokens"] == len(by_class[entry["name"]])
        assert entry["kl"] == pytest.approx(np.mean(by_class[entry["name"]]), abs=1e-5)
    assert len(model["classes"]) == len(by_class) > 1
    by_window.sort(reverse=True)
    for (over, i, w), entry in zip(by_window, model["worst"], strict=False):
        assert (entry["domain"], entry["window"]) == (texts[i].stem, w)
        assert entry["over"] == pytest.approx(over, abs=1e-5)
        assert entry["text"] == tokenizer.decode(
            windows_of(demo, texts[i], 3, 64)[w].tolist(), skip_special_tokens=False
        )
    shown = ok(*arguments, "--window", 64, "--limit", 3, "--details").out
    for word in ("same top-1", "class of token", "rest", "windows that lost most", "95 % interval"):
        assert word in shown


def test_the_interval_by_drawing_windows() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 400)
    low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("42", "digits"),
        (" 7", "digits"),
        ("();", "code"),
        (" ==", "code"),
        ("    ", "code"),
        ("\n\n", "rest"),
        ("\n    ", "code"),
        (" word", "rest"),
        (",", "rest"),
        (" (", "code"),
        ("x=1", "rest"),
        ("", "rest"),
    ],
)
def test_kinds_of_tokens(text: str, kind: str) -> None:
    assert kind_of_text(text) == kind


def with_marks(demo: Path, target: Path) -> int:
    """Copy the demo model with its last token turned into the mark `</think>`; return the mark's token."""
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    mark = max(vocabulary.values())
    text = next(t for t, i in vocabulary.items() if i == mark)
    del vocabulary[text]
    vocabulary["</think>"] = mark
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m if isinstance(m, list) else m.split(" ")) != text]
    rewrite(demo, target, read_tensors(demo), {"eos_token_id": 0})
    tokenizer["added_tokens"].append(
        {
            "id": mark,
            "content": "</think>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return mark


def test_damage_to_a_mark_shows_by_class_and_hardly_in_the_mean(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """Router rows are bent for the tokens before `</think>` alone."""
    mark = with_marks(demo, tmp_path / "model")
    tensors = read_tensors(tmp_path / "model")
    ids = windows_of(demo, demo.parent / "heldout-code.txt", 8, 64)
    before = int(ids[0, 20])
    ids = torch.where(ids == before, torch.full_like(ids, int(ids[0, 21])), ids)  # `before` stands before marks alone
    ids[0, 30], ids[0, 31] = before, mark
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    model = load(demo)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_pre_hook(
                lambda m, args, name=name: inputs.__setitem__(f"{name}.weight", args[0].flatten(0, -2).double())
            )
    with torch.no_grad():
        model(ids)
    changed = dict(tensors)
    for name, seen in inputs.items():
        stored = next(n for n in tensors if n.endswith(name.replace("mlp", "block_sparse_moe")) or n == name)
        one = seen[30]  # the direction that answers to this state and least to all others
        direction = torch.linalg.solve(seen.T @ seen / len(seen) + 1e-4 * torch.eye(len(one)).double(), one)
        direction /= direction @ one
        rows = tensors[stored].double().clone()
        rows[(rows @ one).topk(2).indices] -= 8 * direction
        changed[stored] = rows.to(tensors[stored].dtype)
    rewrite(tmp_path / "model", tmp_path / "damaged", changed, {})
    arguments = ["compare", tmp_path / "model", tmp_path / "damaged", "--text", tmp_path / "ids.jsonl", "--window", 64]
    found = ok(*arguments, "--json").json["models"][1]
    classes = {entry["name"]: entry for entry in found["classes"]}
    assert classes["</think>"]["tokens"] == 1
    assert classes["</think>"]["kl"] > 20 * found["domains"][0]["kl"]
    assert abs(found["domains"][0]["over"]) < 0.05
    assert "</think>" in ok(*arguments, "--details").out


def test_end_tokens_of_both_configs(demo: Path, tmp_path: Path) -> None:
    rewrite(demo, tmp_path / "model", read_tensors(demo), {"eos_token_id": 3})
    checkpoint = tmp_path / "model" / "generation_config.json"
    checkpoint.write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert end_tokens(open_checkpoint(tmp_path / "model")) == {3, 5, 9}
    for wrong in ("{", "[1, 2]", "7"):
        checkpoint.write_text(wrong)
        with pytest.raises(CheckpointError, match="no JSON object"):
            end_tokens(open_checkpoint(tmp_path / "model"))


def test_what_loops() -> None:
    assert loops([1, 2, 3] * 8)
    assert loops([5] * 11)
    assert not loops([5] * 10)
    assert not loops(list(range(200)))
    assert not loops([])


def test_continuations_are_those_of_transformers(demo: Path, tmp_path: Path, ok: Cli) -> None:
    text = demo.parent / "heldout-code.txt"
    recipe = write_recipe(tmp_path / "loud.yaml", demo, top_k=1, scale=1.5)
    arguments = ["compare", demo, recipe, "--text", text, "--window", 64, "--limit", 2]
    arguments += ["--generate", 2, "--new-tokens", 12]
    found = ok(*arguments, "--json").json["models"]
    prompts = windows_of(demo, text, 2, 64)[:, :32]
    ends = json.loads((demo / "config.json").read_text()).get("eos_token_id")
    model: Any = load(demo)
    for prompt, tokens in zip(prompts, found[0]["generated"]["tokens"], strict=True):
        ids = prompt.tolist()
        for token in tokens:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(tokens) == 12 or tokens[-1] == ends
    assert found[0]["generated"]["tokens"] != found[1]["generated"]["tokens"]
    shown = ok(*arguments).out
    assert "that loop" in shown
    assert "that end" in shown


def test_padding_counts_for_nothing(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """Documents of different lengths in windows of their own, against transformers' forward pass over each alone."""
    ok("drop-experts", demo, "--count", 3, "-o", tmp_path / "dropped", "-q")
    ids = windows_of(demo, demo.parent / "heldout-code.txt", 2, 64)
    documents = {"a": [ids[0, :9].tolist(), ids[1, :40].tolist()], "b": [ids[1, 20:63].tolist()]}
    arguments: list[Any] = ["compare", demo, tmp_path / "dropped", "--window", 64, "--apart"]
    for name, rows in documents.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        arguments += ["--text", tmp_path / f"{name}.jsonl"]
    model = ok(*arguments, "--generate", 3, "--new-tokens", 2, "--json").json["models"][1]
    base, other = load(demo), load(tmp_path / "dropped")
    everything = []
    for entry, rows in zip(model["domains"], documents.values(), strict=False):
        figures = []
        for row in rows:
            p, q = (log_probabilities(m, torch.tensor([row]))[0] for m in (base, other))
            target = torch.tensor(row[1:])[:, None]
            over = (p.gather(1, target) - q.gather(1, target))[:, 0]
            kl, overlap = (p.exp() * (p - q)).sum(-1), torch.minimum(p.exp(), q.exp()).sum(-1)
            figures.append(torch.stack([over, kl, overlap, (p.argmax(-1) == q.argmax(-1)).double()]))
        everything.append(torch.cat(figures, dim=1))
        means = everything[-1].mean(dim=1).tolist()
        assert [entry[k] for k in ("over", "kl", "overlap", "agreement")] == pytest.approx(means, abs=1e-5)
        assert entry["interval"][0] <= entry["over"] <= entry["interval"][1]
    total = torch.cat(everything, dim=1)
    assert model["domains"][-1]["over"] == pytest.approx(total[0].mean().item(), abs=1e-5)
    assert sum(c["tokens"] for c in model["classes"]) == total.shape[1] == 8 + 39 + 42
    assert sum(c["kl"] * c["tokens"] for c in model["classes"]) == pytest.approx(total[1].sum().item(), abs=1e-3)
    assert len(model["worst"]) == 3
