"""Repair an edited model by least squares, layer by layer, so that each MoE block says what the original said.

The original and the edited model run side by side on the same tokens. At each layer, the edited block sees its
own stream, with all layers before it already repaired; the target y is the original block's output on the
original stream. Three kinds, each containing the one before it:

    scalar   one factor on the block's output
    expert   a factor per expert: A s = b with A_ij = sum g_i g_j <f_i, f_j> and b_i = sum g_i <f_i, y>
    down     each expert's down-projection: W_e minimises sum |y - sum_(j != e) g_j f_j - g_e W h_e|^2
             + lambda |W - W_e|^2 over the tokens routed to e, expert after expert (Gauss-Seidel)

Nothing is trained and no gradient is taken. docs/measure.md says where it helps and where it does not.

Memory beside the two models' streams: the hidden states of all tokens four times, and for `down` the activations
of one expert and two square matrices of its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.measure.activations import activations, check_form, down
from moesurgery.measure.engine import Engine, ExpertsCall, Progress, Streams, Watch
from moesurgery.measure.factors import per_expert
from moesurgery.measure.outputs import spoken
from moesurgery.measure.skeleton import Experts
from moesurgery.measure.tokens import Tokens
from moesurgery.plan.expr import torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

Kind = Literal["scalar", "expert", "down"]
RIDGE = 0.1


@dataclass(frozen=True)
class Options:
    """How to fit. `ridge` times the mean diagonal draws a solution to where it began; `sweeps` go over the experts.

    `down` leaves an expert alone that saw fewer than `minimum` times as many tokens as it has neurons.
    """

    kind: Kind = "down"
    ridge: float = RIDGE
    sweeps: int = 1
    minimum: float = 2

    def described(self) -> dict[str, Any]:
        """Return the options as a repair records them."""
        return {"kind": self.kind, "ridge": self.ridge, "sweeps": self.sweeps}


@dataclass
class Fitted:
    """The repair of one block: factors [E] (scalar, expert), or down-projections [H, I] by expert as they are stored.

    `error_before` and `error_after` are sum |y - y'|^2 / sum |y|^2 over the calibration tokens.
    """

    where: str
    factors: list[float] | None = None
    down: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    error_before: float = 0.0
    error_after: float = 0.0


def refit(
    original: Engine,
    edited: Engine,
    tokens: Tokens,
    options: Options,
    done: Callable[[Fitted], None],
    progress: Progress = lambda count: None,
) -> None:
    """Fit every MoE block of `edited` in turn, and hand each to `done`. The plan is left alone.

    Raises RefusedError where the two models have other layers, an experts module has another form, or `down` would
    have to change quantised weights.
    """
    where = {b.where for b in original.blocks}
    if where != {b.where for b in edited.blocks} or len(original.layers) != len(edited.layers):
        raise RefusedError("refit: the edited model has other MoE layers than the original")
    for block in (*original.blocks, *edited.blocks):
        if block.experts is None:
            raise RefusedError(f"refit: {block.where}: its routing cannot be read: {block.unread}")
    if options.kind == "down":
        _refuse_quantised(edited)
    size = min(engine.windows_per_batch(tokens, False) for engine in (original, edited))
    said: dict[str, list[torch.Tensor]] = {}
    factors: dict[str, torch.Tensor] = {}

    def listen(call: ExpertsCall) -> torch.Tensor:
        out = call.run()
        said.setdefault(call.block.where, []).append(out.reshape(-1, out.shape[-1]))
        return out

    def repaired_output(call: ExpertsCall) -> Any:
        if call.block.where not in factors:
            return None
        return call.run(call.hidden, call.index, call.weights * _each(factors[call.block.where], call.index))

    reference = repaired = None
    try:
        reference = original.start(tokens, Watch(experts=listen), batch=size)
        repaired = edited.start(tokens, Watch(experts=repaired_output), batch=size)
        for layer, unit in enumerate(edited.layers):
            reference.to_layer(layer)
            repaired.to_layer(layer)
            reference.step(progress)
            with edited.loaded(unit, pin=True):
                for block in (b for b in edited.blocks if b.unit == unit.path):
                    fitted = _fit(repaired, block, said.pop(block.where), options)
                    if fitted.factors is not None:
                        factors[block.where] = _tensor(fitted.factors, edited)
                    done(fitted)
                repaired.step(progress)
            edited.forget(unit)
    finally:
        for streams in (reference, repaired):
            if streams is not None:
                streams.close()


def _refuse_quantised(edited: Engine) -> None:
    for block in edited.blocks:
        for member in block.block.named("down"):
            if edited.plan.tensors[member.name].dtype not in PLAIN_FLOATS or member.stem.companion is not None:
                raise RefusedError(
                    f"refit: {member.name} is quantised: a fitted weight has no scale",
                    "use --refit expert, or dequantise first with `moesurgery convert --dequantize`",
                )


def _tensor(factors: Sequence[float], engine: Engine) -> torch.Tensor:
    import torch

    return torch.tensor([*factors, 1.0], device=engine.device)


def _each(factors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the factor of each chosen expert; 1 for numbers past the last (identity experts)."""
    return factors[index.clamp(max=len(factors) - 1)]


def _fit(streams: Streams, block: Experts, targets: list[torch.Tensor], options: Options) -> Fitted:
    """Fit one block on the stream as it stands at its door."""
    import numpy as np
    import torch

    calls: list[ExpertsCall] = []
    streams.rehearse(Watch(experts=lambda call: calls.append(call) if call.block.where == block.where else None))
    experts = block.block.experts
    gram, cross = np.zeros((experts, experts)), np.zeros(experts)
    total = 0.0
    residuals: list[torch.Tensor] = []  # y - sum g f of each call, padding left as zero
    counts = np.zeros(experts, dtype=np.int64)
    for call, target in zip(calls, targets, strict=True):
        residual = torch.zeros_like(target, dtype=torch.float32)
        for part in spoken(call, experts, {"": (call.index, call.weights)}):
            wanted = target[part.rows].float()
            residual[part.rows] = wanted - part.routed("")
            total += float(wanted.double().pow(2).sum())
            chosen, weights = part.chosen[""], part.weights[""]
            index = part.index.clamp(min=0)
            along = (part.outputs @ wanted[..., None])[..., 0] * weights
            cross += _binned(index[chosen], along[chosen], experts)
            products = part.products * weights[:, :, None] * weights[:, None, :]
            both = chosen[:, :, None] & chosen[:, None, :]
            pairs = index[:, :, None] * experts + index[:, None, :]
            gram += _binned(pairs[both], products[both], experts**2).reshape(experts, experts)
            counts += torch.bincount(index[chosen], minlength=experts).cpu().numpy()
        residuals.append(residual)
    total = max(total, 1e-30)
    fitted = Fitted(block.where, tokens=counts.tolist(), error_before=_energy(residuals) / total)
    if options.kind == "down":
        check_form(calls[0])
        dtype = torch_dtype(streams.engine.plan.tensors[block.block.named("down")[0].name].dtype)
        for _ in range(options.sweeps):
            for expert in range(experts):
                if counts[expert] < options.minimum * down(calls[0].module, expert).shape[1]:
                    fitted.skipped = sorted({*fitted.skipped, expert})
                else:
                    fitted.down[expert] = _refit_expert(calls, residuals, expert, options.ridge, dtype)
        fitted.error_after = _energy(residuals) / total
        return fitted
    if options.kind == "scalar":
        factors = np.full(experts, cross.sum() / gram.sum() if gram.sum() > 0 else 1.0)
    else:
        factors = per_expert(gram, cross, options.ridge)
    fitted.factors = [float(f) for f in factors]
    fitted.error_after = float(total - 2 * factors @ cross + factors @ gram @ factors) / total
    return fitted


def _binned(index: torch.Tensor, values: torch.Tensor, bins: int) -> np.ndarray:
    import torch

    found: np.ndarray = torch.bincount(index, values.double(), minlength=bins).cpu().numpy()
    return found


def _energy(values: Sequence[torch.Tensor]) -> float:
    return sum(float(v.double().pow(2).sum()) for v in values)


def _refit_expert(
    calls: Sequence[ExpertsCall], residuals: Sequence[torch.Tensor], expert: int, ridge: float, dtype: torch.dtype
) -> torch.Tensor:
    """Solve for one expert's down-projection, in place, and bring the residuals up to date. Return it in `dtype`.

    W = W_e + D, with D minimising sum |r - D g h|^2 + lambda |D|^2, r being what is still missing.
    """
    import torch

    module = calls[0].module
    weight = down(module, expert)
    width = weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape[0], width, dtype=torch.float64, device=weight.device)
    parts = []
    for call, residual in zip(calls, residuals, strict=True):
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
        token, slot = torch.where(call.index.reshape(len(hidden), -1) == expert)
        if call.real is not None:
            token, slot = token[call.real[token]], slot[call.real[token]]
        h = activations(module, expert, hidden[token]).float()
        h = h * call.weights.reshape(len(hidden), -1)[token, slot].float()[:, None]
        gram += (h.T @ h).double()
        cross += (residual[token].T @ h).double()
        parts.append((token, h))
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    change = torch.linalg.solve(gram, cross.T).T
    stored: torch.Tensor = (weight.double() + change).to(dtype)
    change = stored.to(weight.dtype) - weight  # what rounding leaves of it
    weight += change
    for (token, h), residual in zip(parts, residuals, strict=True):
        residual[token] -= h @ change.float().T
    return stored
