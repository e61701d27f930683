"""Neurons of FFNs chosen, and the down-projections of those that stay solved, in one run of the original model.

For each expert, from its moments (`neuron_moments`): with K the neurons that stay and R those that go,

    W' = W_K + D, D minimising sum g^2 |W_R h_R - D h_K|^2 + lambda |D|^2

lambda being chosen as for `--refit down` (`ridge`). Experts are solved for alone, and no layer knows what the layers
before it lost: `--refit down` after it does that.
"""

from __future__ import annotations

from collections.abc import Callable

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.expr.nodes import torch_dtype
from moesurgery.fitting.collector import check_routing
from moesurgery.fitting.neuron_moments import Moments, NeuronMoments
from moesurgery.fitting.neuron_order import removal_order
from moesurgery.fitting.ridge import solve
from moesurgery.forward.batch_passes import Progress
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import Hooks
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.repair_file import FittedBlock, Matrices
from moesurgery.surgery.choose_neurons import NeuronChoice, Slimmed, highest


def fit_neurons(
    engine: Engine,
    tokens: Tokens,
    choice: NeuronChoice,
    ridge: float | None,
    done: Callable[[FittedBlock], None],
    progress: Progress = lambda count: None,
) -> None:
    """Choose and solve every block of `choice` that is run, and call `done` with each.

    `ridge` as in `RepairOptions`. Quantised down-projections are not solved: a fitted weight has no scale. Raises
    RefusedError where experts' activations cannot be read.
    """
    import torch

    check_routing(engine, "slim-experts")
    moments = NeuronMoments(engine)
    passes = engine.start(tokens, Hooks(experts=moments.see), batch=engine.windows_per_batch(tokens, False))
    try:
        for layer, unit in enumerate(engine.layers):
            passes.to_layer(layer)
            with engine.weights.loaded(unit, pin=True), torch.no_grad():
                passes.step(progress)
                fits: dict[str, _BlockFit] = {}
                for found in moments.of_layer(unit, passes):
                    if found.where in choice.blocks:
                        fits.setdefault(found.where, _BlockFit(engine, choice, found.where)).add(found, ridge)
                for fit in fits.values():
                    done(fit.finished())
            engine.weights.unpin()
    finally:
        moments.close()
        passes.close()


class _BlockFit:
    """The fit of one block, expert by expert."""

    def __init__(self, engine: Engine, choice: NeuronChoice, where: str) -> None:
        self.slimmed: Slimmed = choice.blocks[where]
        self.by, self.kept = choice.by, choice.kept.get(where)
        stored = engine.plan.tensors[next(m.name for m in self.slimmed.block.named("down") if m.stem.main)].dtype
        self.dtype = torch_dtype(stored) if stored in PLAIN_FLOATS else None
        self.fitted = FittedBlock(where)
        self.total = 0.0

    def add(self, found: Moments, ridge: float | None) -> None:
        import torch

        kept = self.kept[found.expert] if self.kept else chosen_neurons(found, self.by, self.slimmed)
        stays = torch.tensor(kept, device=found.weight.device)
        goes = torch.ones(found.weight.shape[1], dtype=torch.bool, device=stays.device)
        goes[stays] = False
        wide, gram = found.weight.double(), found.gram.sum(0)
        matrices: Matrices = {"kept": stays.cpu()}
        lost = wide[:, goes]
        error = float((lost @ gram[goes][:, goes] * lost).sum())
        self.fitted.error_before += error
        if self.dtype is not None:
            own = found.gram[:, stays][:, :, stays]
            cross = lost @ found.gram[:, goes][:, :, stays]
            solution = solve(own, cross, ridge)
            self.fitted.ridges.append(solution.ridge)
            change = wide.new_zeros(len(wide), len(stays)) if solution.change is None else solution.change
            matrices["down"] = (wide[:, stays] + change).to(self.dtype)
            error += float(((change @ own.sum(0) - 2 * cross.sum(0)) * change).sum())
        self.fitted.matrices[found.expert] = matrices
        self.fitted.tokens.append(found.tokens)
        self.fitted.error_after += error
        self.total += float((wide @ gram * wide).sum())

    def finished(self) -> FittedBlock:
        """Return the fit, with errors as shares of the sum of all experts' |g W h|^2."""
        self.fitted.error_before /= max(self.total, 1e-30)
        self.fitted.error_after /= max(self.total, 1e-30)
        return self.fitted


def chosen_neurons(found: Moments, by: str, slimmed: Slimmed) -> list[int]:
    """Return the neurons that an expert keeps, by its moments."""
    if by == "saliency":
        return highest(found.saliency.cpu().numpy()[None], slimmed.width, slimmed.size)[0]
    order, _ = removal_order(found.gram.sum(0), found.outputs, slimmed.width, slimmed.size)
    gone = {int(first) * slimmed.size + i for first in order for i in range(slimmed.size)}
    return [neuron for neuron in range(found.weight.shape[1]) if neuron not in gone]
