"""Repair an edited model by least squares, layer by layer, so that its hidden states match the original's.

The original and the edited model run together on the same tokens. At each layer, the input of the edited block is the
edited model's own hidden states, with all layers before it already repaired. The target y is the routed output with
which the layer's output would equal the original's, so it also corrects errors left by the layers before. Where a model
does not simply add the routed output to the residual stream, y is the output of the original block.

Five kinds; scalar, expert, down and all each contain the one before:

    scalar   one factor on the block's output
    expert   a factor per expert: A s = b with A_ij = sum g_i g_j <f_i, f_j> and b_i = sum g_i <f_i, y>
    router   the router's rows, for the block's linearised output (`router_fit`), then the bias by which it selects
             (`bias_fit`)
    down     each expert's down-projection: W_e minimises sum |y - sum_(j != e) g_j f_j - g_e W h_e|^2
             + lambda |W - W_e|^2 over the tokens routed to e, expert after expert (Gauss-Seidel)
    all      gate, up and down of each expert, for its linearised output, likewise (`gauss_newton`)

Each solution is regularised towards no change, by a ridge chosen on windows it was not fitted on (`ridge`), so that a
change that does not generalise to other text is not made. There is no training and no gradient of a loss.
docs/measure-tables.md shows where it helps and where it does not.

Memory beside the two models' hidden states and one layer: the hidden states of all tokens four times. For `down`
also the activations of one expert, and in float64 three square matrices of its width and four of its shape; for `all`
those activations seven times and an expert's weights, in float32, three times, or more often while that is
below 192 MB. Fitted matrices are held until their block is done, as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import torch_dtype
from moesurgery.fitting.bias_fit import fit_bias
from moesurgery.fitting.expert_fit import RoutedTokens, check_names, fit_expert
from moesurgery.fitting.ridge import RidgeSolution, solve, squared_norm
from moesurgery.fitting.router_fit import fit_router, router_of
from moesurgery.forward.activations import check_form, down
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.engine import Engine
from moesurgery.forward.expert_outputs import by_expert, expert_outputs, gram_by_expert
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.scratch import Scratch, ScratchState
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan
from moesurgery.plan.requantise import opened, quantised_experts
from moesurgery.stats.repair_file import FittedBlock

if TYPE_CHECKING:
    import torch

RepairKind = Literal["scalar", "expert", "router", "down", "all"]
MATRICES = ("down", "all")
SWEEPS: dict[RepairKind, int] = {"scalar": 1, "expert": 1, "router": 1, "down": 1, "all": 2}  # where none are asked for


@dataclass(frozen=True)
class RepairOptions:
    """How to fit. `ridge` times the mean diagonal penalises a change; None chooses it on held-out windows.

    `sweeps` go over the experts. `down` and `all` leave an expert alone that saw fewer than `minimum` times as many
    tokens as it has neurons.
    """

    kind: RepairKind = "down"
    ridge: float | None = None
    sweeps: int = 1
    minimum: float = 2

    def described(self) -> dict[str, Any]:
        """Return the options as a repair records them."""
        return {"kind": self.kind, "ridge": "auto" if self.ridge is None else self.ridge, "sweeps": self.sweeps}


def fit_layers(
    original: Engine,
    edited: Engine,
    tokens: Tokens,
    options: RepairOptions,
    done: Callable[[FittedBlock], None],
    progress: Progress = lambda count: None,
    *,
    scratch: Scratch | None = None,
    state: ScratchState | None = None,
) -> None:
    """Fit every MoE block of `edited` in turn, and call `done` with each. The plan is not changed.

    With `scratch`, state is saved between layers; with the `state` that was loaded from there, layers that are done are
    not run again. Where the two engines have a GPU each, the original is run one layer ahead.

    Raises RefusedError where the two models have other layers, or an experts module has another form.
    """
    import torch

    where = {b.where for b in original.blocks}
    if where != {b.where for b in edited.blocks} or len(original.layers) != len(edited.layers):
        raise RefusedError("refit: the edited model has other MoE layers than the original")
    for block in (*original.blocks, *edited.blocks):
        if block.experts is None:
            raise RefusedError(f"refit: {block.where}: its routing cannot be read: {block.unread}")
    if options.kind == "router":
        for block in edited.blocks:
            router_of(edited.plan, block)
    size = min(engine.windows_per_batch(tokens, False) for engine in (original, edited))
    plan = opened(edited.plan, quantised_experts(edited.plan)) if options.kind in MATRICES else edited.plan
    size = state.batch if state else size
    routed: dict[str, list[torch.Tensor]] = {}  # the original's routed outputs, by block
    factors: dict[str, torch.Tensor] = {w: named["factors"] for w, named in state.sums.items()} if state else {}

    def original_output(call: ExpertsCall) -> torch.Tensor:
        out = call.run()
        routed.setdefault(call.block.where, []).append(out.reshape(-1, out.shape[-1]))
        return out

    def repaired_output(call: ExpertsCall) -> Any:
        if call.block.where not in factors:
            return None
        return call.run(call.hidden, call.index, call.weights * _each(factors[call.block.where], call.index))

    def next_layer(layer: int) -> tuple[list[Any], dict[str, list[torch.Tensor]]]:
        """Run the original through a layer; return the layer's outputs, and the routed outputs of its blocks."""
        assert reference is not None
        reference.to_layer(layer)
        reference.step(progress)
        return reference.outputs, {where: routed.pop(where) for where in list(routed)}

    def repair(block: ExpertsModule, outputs: Sequence[Any], originals: Sequence[torch.Tensor]) -> None:
        """Fit one block, in a function of its own so that its memory is freed before the next."""
        assert repaired is not None
        device = edited.meta_model.devices[edited.meta_model.units[block.unit].stage]
        originals = [y.to(device) for y in originals]
        wants_logits = options.kind == "router"

        def now() -> tuple[list[ExpertsCall], list[torch.Tensor]]:
            assert repaired is not None
            return _missing(repaired, block, repaired_output, originals, outputs, wants_logits)

        calls, missing = now()
        total = max(squared_norm([call.rows(y) for y, call in zip(originals, calls, strict=True)]), 1e-30)
        fitted = _fit(edited, plan, block, calls, missing, total, options, now)
        if fitted.factors is not None:
            factors[block.where] = torch.tensor([*fitted.factors, 1.0])
        done(fitted)

    reference: BatchPasses | None = None
    repaired: BatchPasses | None = None
    ahead = ThreadPoolExecutor(1, "original") if original.on_gpu and original.device != edited.device else None
    first, resumes = (state.layer, [state.resume(0), state.resume(1)]) if state else (0, [None, None])
    if state:
        progress(2 * first * tokens.count)
    try:
        reference = original.start(tokens, Hooks(experts=original_output), batch=size, resume=resumes[0])
        repaired = edited.start(tokens, Hooks(experts=repaired_output), batch=size, resume=resumes[1])
        pending = ahead.submit(next_layer, first) if ahead else None
        for layer, unit in enumerate(edited.layers[first:], first):
            outputs, originals = pending.result() if pending else next_layer(layer)
            if ahead and layer + 1 < len(edited.layers):
                pending = ahead.submit(next_layer, layer + 1)
            repaired.to_layer(layer)
            with edited.weights.loaded(unit, pin=True):
                for block in (b for b in edited.blocks if b.unit == unit.path):
                    repair(block, outputs, originals[block.where])
                repaired.step(progress)
            edited.weights.forget(unit)
            if scratch is not None:
                sums = {where: {"factors": values} for where, values in factors.items()}
                scratch.keep([reference, repaired], size, sums, [outputs, repaired.outputs])
    finally:
        if ahead is not None:
            ahead.shutdown()
        for passes in (reference, repaired):
            if passes is not None:
                passes.close()


def _each(factors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the factor of each chosen expert; 1 for numbers past the last (identity experts)."""
    return factors.to(index.device)[index.clamp(max=len(factors) - 1)]


def _missing(
    passes: BatchPasses,
    block: ExpertsModule,
    others: Callable[[ExpertsCall], Any],
    originals: Sequence[torch.Tensor],
    outputs: Sequence[Any],
    router_logits: bool,
) -> tuple[list[ExpertsCall], list[torch.Tensor]]:
    """Return a block's calls on the edited model's hidden states, and the residual [T, H]: target minus routed output.

    `originals` are the original block's routed outputs, `outputs` the original layer's outputs. Padding is zero.
    """
    calls: list[ExpertsCall] = []
    routed: list[torch.Tensor] = []

    def edited_output(call: ExpertsCall) -> Any:
        if call.block.where != block.where:
            return others(call)
        calls.append(call)
        routed.append(call.run())
        return routed[-1]

    layer_outputs = passes.peek(Hooks(experts=edited_output, router_logits=router_logits))
    share = _share(passes, block, routed[0], layer_outputs[0])
    missing = []
    for i, call in enumerate(calls):
        if share is None:
            left = (originals[i] - routed[i].view_as(originals[i])).float()
        else:
            output = _hidden(layer_outputs[i]).float()
            left = (_hidden(outputs[i]).to(output.device).float() - output).view_as(originals[i]) / share
        if call.real is not None:
            left[~call.real] = 0
        missing.append(left)
    return calls, missing


def _hidden(output: Any) -> torch.Tensor:
    """Return the hidden states among what a layer returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _share(passes: BatchPasses, block: ExpertsModule, routed: torch.Tensor, output: Any) -> float | None:
    """Return the factor with which a block's routed output is added to the layer's output; None where it is not simply
    added. Found by doubling the routed output on the first batch."""

    def twice(call: ExpertsCall) -> Any:
        return 2 * call.run() if call.block.where == block.where else None

    (changed,) = passes.peek(Hooks(experts=twice), 1)
    if _hidden(output).numel() != routed.numel():
        return None
    change = (_hidden(changed).float() - _hidden(output).float()).flatten()
    added = routed.float().flatten()
    share = float(change @ added / added.pow(2).sum().clamp(min=1e-30))
    return share if share > 0 and (change - share * added).norm() <= 0.1 * change.norm() else None


def _fit(
    edited: Engine,
    plan: Plan,
    block: ExpertsModule,
    calls: Sequence[ExpertsCall],
    missing: Sequence[torch.Tensor],
    total: float,
    options: RepairOptions,
    now: Callable[[], tuple[list[ExpertsCall], list[torch.Tensor]]],
) -> FittedBlock:
    """Fit one block for its calls. `missing` is updated where matrices are fitted; `now` computes both again.

    `plan` is the edited one, with quantised experts opened where matrices are fitted.
    """
    import torch

    experts = block.block.experts
    index = torch.cat([call.rows(call.index).flatten() for call in calls])
    counts = torch.bincount(index[index < experts], minlength=experts)
    fitted = FittedBlock(block.where, tokens=counts.tolist(), error_before=squared_norm(missing) / total)
    held_out = 0.0  # of the selection bias
    if options.kind == "router":
        router = router_of(plan, block)
        assert block.router is not None
        weight, dtype = edited.meta_model.tensor(block.router), torch_dtype(plan.tensors[router.name].dtype)
        settings = plan.anatomy.settings
        fitted.router, change, calls, missing = fit_router(
            settings, weight, router.axis or 0, calls, missing, options.ridge, dtype, now
        )
        stored = next((m.name for m in block.block.named("correction_bias")), None)
        if stored is not None and block.correction is not None and plan.tensors[stored].dtype in PLAIN_FLOATS:
            bias, dtype = edited.meta_model.tensor(block.correction), torch_dtype(plan.tensors[stored].dtype)
            fitted.bias, held_out, calls, missing = fit_bias(settings, bias, dtype, calls, missing, now)
        changes, fitted.error_after = [change], squared_norm(missing) / total
    elif options.kind in MATRICES:
        changes = _fit_matrices(plan, calls, missing, options, fitted)
        fitted.error_after = squared_norm(missing) / total
    else:
        changes = [_fit_factors(calls, missing, options, fitted)]
        fitted.error_after /= total
    fitted.ridges = [change.ridge for change in changes]
    if options.ridge is None:
        held_out += sum(c.held_out or 0.0 for c in changes)
        fitted.error_held_out = fitted.error_before + held_out / total
    return fitted


def _fit_factors(
    calls: Sequence[ExpertsCall], missing: Sequence[torch.Tensor], options: RepairOptions, fitted: FittedBlock
) -> RidgeSolution:
    """Fit the factors of a block, and return how their change from 1 was found."""
    import torch

    experts, device = calls[0].block.block.experts, missing[0].device
    gram = torch.zeros(2, experts, experts, dtype=torch.float64, device=device)
    cross = torch.zeros(2, experts, dtype=torch.float64, device=device)
    for call, left in zip(calls, missing, strict=True):
        for part in expert_outputs(call, experts, {"": (call.index, call.weights)}):
            along = part.along(left[part.rows]) * part.weights[""]
            cross[part.half] += by_expert(part.index, along, experts).sum(0, dtype=torch.float64)
            gram[part.half] += gram_by_expert(part, "", experts).double()
    if options.kind == "scalar":
        change = solve(gram.sum((1, 2), keepdim=True), cross.sum(1).view(2, 1, 1), options.ridge)
    else:
        change = solve(gram, cross[:, None], options.ridge)
    step = torch.zeros(experts, dtype=torch.float64, device=device)
    if change.change is not None:
        step += change.change[0]
    fitted.factors = (1 + step).tolist()
    fitted.error_after = squared_norm(missing) + float(step @ gram.sum(0) @ step - 2 * step @ cross.sum(0))
    return change


def _fit_matrices(
    plan: Plan,
    calls: Sequence[ExpertsCall],
    missing: Sequence[torch.Tensor],
    options: RepairOptions,
    fitted: FittedBlock,
) -> list[RidgeSolution]:
    """Fit the experts of a block in place, one after the other, and return how each change was found."""
    block = calls[0].block.block
    check_form(calls[0])
    if options.kind == "all":
        check_names(plan, calls[0])
    dtype = torch_dtype(plan.tensors[plan.anatomy.block(block.where).named("down")[0].name].dtype)
    changes = []
    module, routed = calls[0].module, RoutedTokens(calls, block.experts)
    for _ in range(options.sweeps):
        for expert in range(block.experts):
            if fitted.tokens[expert] < options.minimum * down(module, expert).shape[1]:
                fitted.skipped = sorted({*fitted.skipped, expert})
                continue
            whole = options.kind == "all"
            matrices, change = fit_expert(expert, module, routed, missing, options.ridge, dtype, whole=whole)
            changes.append(change)
            if matrices:
                fitted.matrices[expert] = matrices
    return changes
