"""Statistics of experts: every sum against a double loop over tokens on the model's own routing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.fitting.collector import collect, plan_with_top_k
from moesurgery.forward import engine as engine_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import BlockCall, Hooks
from moesurgery.forward.paired_run import PairedRun
from moesurgery.forward.tokens import Tokens, mixed, padded
from moesurgery.stats.criteria import CRITERIA, agreement, scores, spearman, super_experts
from moesurgery.stats.statistics_file import BlockStats, Stats, load_stats
from tests.conftest import Result
from tests.tiny import PROMPT, TINY, load, logits

Cli = Callable[..., Result]
WITH_TOP_K = [t for t in TINY if t != "phimoe"]


@pytest.fixture(autouse=True)
def one_window_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", PROMPT.shape[1])


def stats_of(path: Path, tokens: Tokens | None = None, top_k: tuple[int, ...] = ()) -> Stats:
    return collect(Engine(plan_of(open_checkpoint(path))), tokens or Tokens(PROMPT), top_k)


class Seen:
    """What a transformers model routes where: the inputs of its `experts` modules, and each expert's output."""

    def __init__(self, path: Path, prompt: torch.Tensor = PROMPT, **changes: Any) -> None:
        self.model = load(path, **changes)
        self.calls: dict[str, tuple[torch.Tensor, ...]] = {}
        self.modules: dict[str, torch.nn.Module] = {}
        for name, module in self.model.named_modules():
            if name.endswith(".experts"):
                where = ".".join(name.split(".")[:3])
                self.modules[where] = module
                module.register_forward_pre_hook(partial(self._see, where), with_kwargs=True)
        logits(self.model, prompt)

    def _see(self, where: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.setdefault(where, (*args, *kwargs.values()))

    def output(self, where: str, token: int, expert: int) -> np.ndarray:
        """f_e(x) for one token, by calling the module with that expert alone and weight one."""
        hidden = self.calls[where][0][token : token + 1]
        with torch.no_grad():
            out = self.modules[where](hidden, torch.tensor([[expert]]), torch.ones(1, 1))
        return out[0].double().numpy()


def by_loops(seen: Seen, where: str, windows: torch.Tensor, real: torch.Tensor) -> dict[str, np.ndarray]:
    """All sums of one block, token by token and expert by expert."""
    _, index, weights = seen.calls[where]
    experts, width = 8, seen.calls[where][0].shape[-1]
    sums: dict[str, np.ndarray] = {n: np.zeros((2, experts)) for n in ("count", "gate", "gate2", "norm", "gate_norm")}
    sums |= {"peak": np.zeros((2, experts)), "gram": np.zeros((2, experts, experts))}
    sums |= {"norm2": np.zeros((2, experts)), "pair_norms": np.zeros((2, experts, experts))}
    sums |= {"tokens": np.zeros(2), "mass": np.zeros(2), "output": np.zeros((experts, width))}
    for t in range(len(index)):
        if not real[t]:
            continue
        half = int(windows[t]) % 2
        sums["tokens"][half] += 1
        sums["mass"][half] += float(weights[t].double().sum()) ** 2
        said = {int(e): seen.output(where, t, int(e)) for e in index[t]}
        gates = {int(e): float(w) for e, w in zip(index[t], weights[t], strict=True)}
        for e, f in said.items():
            sums["count"][half, e] += 1
            sums["gate"][half, e] += gates[e]
            sums["gate2"][half, e] += gates[e] ** 2
            sums["norm"][half, e] += np.linalg.norm(f)
            sums["norm2"][half, e] += float(f @ f)
            sums["gate_norm"][half, e] += gates[e] * np.linalg.norm(f)
            sums["peak"][half, e] = max(sums["peak"][half, e], np.abs(f).max())
            sums["output"][e] += f
            for other, g in said.items():
                sums["gram"][half, e, other] += gates[e] * gates[other] * float(f @ g)
                sizes = float(np.linalg.norm(f) * np.linalg.norm(g))
                sums["pair_norms"][half, e, other] += gates[e] * gates[other] * sizes
    return sums


def assert_close(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert found.shape == expected.shape, name
    assert np.abs(found - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max()), name


@pytest.mark.parametrize("model_type", list(TINY))
def test_every_sum_by_brute_force(models: Any, model_type: str) -> None:
    path = models(model_type)
    stats = stats_of(path)
    seen = Seen(path)
    windows = torch.arange(2).repeat_interleave(24)
    assert list(stats.blocks) == list(seen.calls)
    for where, block in stats.blocks.items():
        expected = by_loops(seen, where, windows, torch.ones(48, dtype=torch.bool))
        for name, values in expected.items():
            assert_close(block.sums[name], values, name)


def test_padding_never_counts(models: Any) -> None:
    path = models("mixtral")
    sequences = [PROMPT[0, :9].tolist(), PROMPT[1].tolist(), PROMPT[0, 9:14].tolist()]
    found = stats_of(path, padded(sequences))
    apart = [stats_of(path, Tokens(torch.tensor([ids]))) for ids in sequences]
    for where, block in found.blocks.items():
        assert block.total("tokens") == 9 + 24 + 5
        for name in ("count", "gate_norm", "gram", "probability", "entropy", "logits", "output"):
            assert_close(block.total(name), sum(s.blocks[where].total(name) for s in apart), name)
        assert block.sums["tokens"].tolist() == [14, 24]  # windows 0 and 2, window 1


@pytest.mark.parametrize(("model_type", "score"), [("mixtral", "softmax"), ("deepseek_v3", "sigmoid")])
def test_router_sums(models: Any, model_type: str, score: str) -> None:
    path = models(model_type)
    stats = stats_of(path)
    seen = Seen(path)
    for where, block in stats.blocks.items():
        router = seen.model.get_submodule(f"{where}.mlp.gate").weight.double()
        z = seen.calls[where][0].double() @ router.T
        p = z.softmax(-1) if score == "softmax" else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
        assert_close(block.total("probability"), p.sum(0).detach().numpy(), "probability")
        assert_close(block.total("entropy"), -(p * p.log()).sum().detach().numpy(), "entropy")
        assert_close(block.total("logits"), (z.T @ z).detach().numpy(), "logits")


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("model_type", WITH_TOP_K)
def test_sums_for_another_top_k(models: Any, model_type: str, top_k: int) -> None:
    """The routing at the new top-k on the inputs of the old model, by transformers with the config changed."""
    path = models(model_type)
    stats = stats_of(path, top_k=(top_k,))
    seen = Seen(path)
    for where, block in stats.blocks.items():
        hidden, index, weights = seen.calls[where]
        other = Seen(path, num_experts_per_tok=top_k)
        parent = other.model.get_submodule(".".join(where.split(".")[:3]))
        del other.calls[where]
        with torch.no_grad():
            moe = next(m for n, m in parent.named_children() if any(x is other.modules[where] for x in m.children()))
            moe(hidden.view(2, 24, -1))
        _, new_index, new_weights = other.calls[where]
        assert new_index.shape[-1] == top_k
        gram, cross = np.zeros((8, 8)), np.zeros(8)
        for t in range(48):
            y = sum(float(w) * seen.output(where, t, int(e)) for e, w in zip(index[t], weights[t], strict=True))
            said = [
                (int(e), float(w) * seen.output(where, t, int(e)))
                for e, w in zip(new_index[t], new_weights[t], strict=True)
            ]
            for e, f in said:
                cross[e] += f @ y
                for o, g in said:
                    gram[e, o] += f @ g
        assert_close(block.total(f"gram@{top_k}"), gram, "gram")
        assert_close(block.total(f"cross@{top_k}"), cross, "cross")
        assert block.total(f"gate2@{top_k}").sum() == pytest.approx(float((new_weights.double() ** 2).sum()), rel=1e-4)


# Criteria


def test_a_paired_run_holds_no_layer_that_the_original_has_given_free(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the layer before would be there beside the next."""
    engine = Engine(plan_of(open_checkpoint(models("mixtral"))), keep=0)
    paired = PairedRun(engine, plan_with_top_k(engine, 3))
    load_unit, held = engine.meta_model.load, []

    def loading(unit: Any) -> None:
        held.append([u.path for u in paired.engine.layers if u.path in paired.engine.weights.resident])
        load_unit(unit)

    monkeypatch.setattr(engine.meta_model, "load", loading)
    routings: list[str] = []

    def block(around: BlockCall) -> Any:
        paired.routing(around)
        routings.extend(u.path for u in paired.engine.layers if u.path in paired.engine.weights.resident)
        return around.run()

    engine.run(Tokens(PROMPT), Hooks(block=block))
    assert set(routings) == {u.path for u in engine.layers}
    assert not any(held)
    paired.close()
    assert not engine.weights.freed


def block_of(**sums: Any) -> BlockStats:
    """A block whose sums are all in the first half."""
    arrays = {n: np.asarray(v, dtype=float) for n, v in sums.items()}
    return BlockStats("b", {n: np.stack([v, np.zeros_like(v)]) for n, v in arrays.items()})


def test_reap_is_its_published_formula(models: Any) -> None:
    """Mean over routed tokens of gate times output norm, from softmax routing computed here."""
    path = models("mixtral")
    stats = stats_of(path)
    seen = Seen(path)
    for where, block in stats.blocks.items():
        hidden = seen.calls[where][0]
        router = seen.model.get_submodule(f"{where}.mlp.gate").weight.detach()
        values, index = (hidden @ router.T).softmax(-1).topk(2)
        values = values / values.sum(-1, keepdim=True)
        for e in range(8):
            tokens, slots = torch.where(index == e)
            each = [
                float(values[t, s]) * np.linalg.norm(seen.output(where, int(t), e))
                for t, s in zip(tokens, slots, strict=True)
            ]
            expected = sum(each) / max(len(each), 32)
            assert scores(block, "reap")[e] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_reap_by_hand() -> None:
    """Gates [.6, .4] and [.5, .5]; norms 2, 2 and 1, 4: the example of llm-compressor's test, scaled past the floor."""
    n = 32
    block = block_of(count=[2 * n, n, n, 0], gate_norm=[n * (0.6 * 2 + 0.5 * 2.2), n * 0.4 * 2, n * 0.5 * 4, 0])
    assert scores(block, "reap") == pytest.approx([1.15, 0.8, 2.0, 0])


def test_rare_experts_are_not_overrated() -> None:
    block = block_of(count=[64, 1], gate_norm=[64.0, 8.0])
    assert scores(block, "reap") == pytest.approx([1.0, 0.25])


def test_gram_drops_what_the_output_misses_least() -> None:
    """Greedy by the norm of the summed contributions of the dropped experts, on vectors."""
    generator = np.random.default_rng(0)
    said = generator.standard_normal((5, 7)) * np.array([[3], [1], [4], [0.5], [3.5]])
    said[3] = -0.9 * said[1]  # together these two say next to nothing
    block = block_of(gram=said @ said.T)
    order: list[int] = []
    while len(order) < 5:
        candidates = [e for e in range(5) if e not in order]
        order.append(min(candidates, key=lambda e: np.linalg.norm(said[[*order, e]].sum(0))))
    assert np.argsort(scores(block, "gram")).tolist() == order
    assert set(order[:2]) == {1, 3}


def test_super_experts_stand_far_above_all_others() -> None:
    quiet = np.linspace(1, 2, 8)
    blocks = {f"layers.{i}": block_of(peak=quiet) for i in range(30)}
    blocks["layers.3"] = block_of(peak=[*quiet[:7], 900])
    blocks["layers.29"] = block_of(peak=[*quiet[:7], 1000])  # in the last quarter
    for where, block in blocks.items():
        block.where = where
    assert super_experts(Stats(blocks, {})) == {"layers.3": [7]}


def test_agreement_of_halves() -> None:
    same = np.stack([np.arange(8.0), np.arange(8.0)])
    turned = np.stack([np.arange(8.0), np.arange(8.0)[::-1]])
    stats = Stats({"a": BlockStats("a", {"count": same}), "b": BlockStats("b", {"count": turned})}, {})
    found = agreement(stats, "frequency")
    assert found == pytest.approx({"spearman": 0, "spearman_worst": -1, "overlap": 0.5, "overlap_worst": 0})


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties: bool) -> None:
    from scipy.stats import spearmanr

    generator = np.random.default_rng(1)
    a, b = (generator.integers(0, 4, 20) if ties else generator.standard_normal(20) for _ in range(2))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_halves_hold_the_same_mixture_of_texts() -> None:
    parts = [torch.full((n, 4), i) for i, n in enumerate((6, 2, 4, 6))]
    found = mixed([Tokens(part) for part in parts]).ids[:, 0]
    assert found[::2].tolist() == found[1::2].tolist()
    assert found.bincount().tolist() == [6, 2, 4, 6]


# Files and refusals


def test_what_is_saved_is_what_was_collected(models: Any, tmp_path: Path) -> None:
    stats = stats_of(models("mixtral"), top_k=(3,))
    path = stats.save(tmp_path / "s")
    again = load_stats(path)
    assert again.about == stats.about
    assert list(again.blocks) == list(stats.blocks)
    for where, block in stats.blocks.items():
        for name, values in block.sums.items():
            assert np.allclose(again.blocks[where].sums[name], values, rtol=1e-6), name


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mixtral", {"num_hidden_layers": 3}, "model.layers.2 is in the model only"),
        ("mixtral", {"num_local_experts": 4}, "has 4 experts, the statistics have 8"),
        ("mixtral", {"num_experts_per_tok": 3}, "routes to 3 experts, the statistics saw 2"),
    ],
)
def test_statistics_of_another_model(
    models: Any, tmp_path: Path, model_type: str, changes: dict[str, int], message: str
) -> None:
    path = stats_of(models("mixtral"), top_k=(1,)).save(tmp_path / "s")
    plan = plan_of(open_checkpoint(models(model_type, **changes)))
    with pytest.raises(RefusedError, match=message):
        apply(plan, "rescale", top_k=1, scale="measured", stats=str(path))


@pytest.mark.parametrize("content", [b"", b"no statistics", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_files_that_are_no_statistics(models: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="statistics"):
        load_stats(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError):
        load_stats(tmp_path / "missing.safetensors")


def test_a_family_whose_routing_cannot_be_seen(tmp_path: Path) -> None:
    from tests.tiny import save_tiny

    save_tiny("llama", tmp_path / "dense", intermediate_size=48)
    with pytest.raises(RefusedError, match="dense model"):
        stats_of(tmp_path / "dense")


# The command


def test_the_command(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    texts = ["--text", demo.parent / "calibration-code.txt", "--text", demo.parent / "calibration-manual.txt"]
    options = [*texts, "--window", 64, "--tokens", 512, "--top-k", 3]
    result = ok("collect", demo, *options, "-o", tmp_path / "s")
    assert "6 MoE layers, 512 tokens" in result.out
    for by in CRITERIA:
        assert by in result.out
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["tokens"] == 512
    assert document["other_top_k"] == [3]
    assert [t["file"] for t in document["text"]] == ["calibration-code.txt", "calibration-manual.txt"]
    assert len(document["layers"]) == 6
    assert all(0 < layer["entropy"] < math.log(8) for layer in document["layers"])
    again = cli("collect", demo, *options, "-o", tmp_path / "s")
    assert again.code == 2
    assert "--force" in again.err
    forced = ok("collect", demo, *options, "-o", tmp_path / "s", "--force", "--json").json
    assert forced == document
