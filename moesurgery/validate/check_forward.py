"""F: a few seeded prompts through the model, streamed layer by layer by `forward.engine`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.checkpoint.filenames import PROVENANCE
from moesurgery.checkpoint.finding import Finding
from moesurgery.errors import SurgeryError
from moesurgery.plan.plan import plan_of
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.check_provenance import recorded_steps
from moesurgery.validate.check_vocabulary import embedding_of
from moesurgery.validate.context import Context
from moesurgery.validate.parent_models import reference_of

if TYPE_CHECKING:
    import torch

    from moesurgery.forward.hooks import ExpertsCall

PROMPTS, LENGTH, SEED = 8, 64, 0
ENOUGH = 20  # choices per expert before one that was never chosen counts: trained experts may wait for other words
SAME = 1e-3  # nats: what rounding may do to the logits of two forms of one model
ALIKE = 1e-6  # of logits that are the same


@dataclass
class Trace:
    """What a forward pass showed. `chosen` has, for each MoE layer, how often each expert was chosen.

    `spread` is the largest standard deviation of logits over the vocabulary, `movement` their largest change from
    one position to another; `divergence` the mean KL (nats) of the reference to it, `largest` the largest
    difference of logits.
    """

    chosen: dict[str, list[int]] = field(default_factory=dict)
    not_finite: int = 0
    spread: float = 0.0
    movement: float = 0.0
    divergence: float = 0.0
    largest: float = 0.0

    def count(self, call: ExpertsCall) -> None:
        """Count the experts that a router has chosen, as a watch of the engine."""
        import torch

        before = self.chosen.setdefault(call.block.where, [0] * call.block.block.experts)
        counts = torch.bincount(call.index.flatten(), minlength=len(before)).tolist()
        self.chosen[call.block.where] = [a + b for a, b in zip(before, counts, strict=False)]

    def see(self, logits: torch.Tensor) -> None:
        """Take in the logits [S, V] of one prompt."""
        self.not_finite += int((~logits.isfinite()).any(dim=-1).sum())
        self.spread = max(self.spread, float(logits.std(dim=-1).max()))
        self.movement = max(self.movement, float((logits - logits[:1]).abs().max()))

    def compare(self, logits: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in the logits [S, V] of one prompt, and the reference's."""
        self.largest = max(self.largest, float((logits - reference).abs().max()))
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) / PROMPTS


def seeded_prompts(rows: int) -> torch.Tensor:
    """Return token ids [prompts, tokens] over the whole vocabulary, the same for every model of `rows` tokens."""
    import torch

    return torch.randint(0, rows, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(SEED))


def run_prompts(checkpoint: Checkpoint, prompts: torch.Tensor, reference: Checkpoint | None = None) -> Trace:
    """Send prompts [N, S] through a model, and through a reference beside it, layer by layer.

    Memory: one layer of each, and the logits of one prompt. Raises RefusedError where a model cannot be run,
    CheckpointError where it does not hold what its code expects.
    """
    from moesurgery.forward.batch_passes import BatchPasses
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.hooks import Hooks
    from moesurgery.forward.tokens import Tokens

    trace = Trace()
    runs: list[BatchPasses] = []
    try:
        for each in (checkpoint, reference):
            if each is not None:
                engine = Engine(plan_of(each))
                hooks = Hooks(experts=trace.count) if each is checkpoint else Hooks()
                runs.append(engine.start(Tokens(prompts), hooks, batch=1))
                runs[-1].to_layer(len(engine.layers))
        for number in range(len(prompts)):
            logits = [run_prompts.finish(number)[0].float() for run_prompts in runs]
            trace.see(logits[0])
            if reference is not None:
                trace.compare(*logits)
    finally:
        for each_run in runs:
            each_run.close()
    return trace


@check("F01", "F02", "F03")
def forward(subject: Context) -> Outcome:
    """Run the prompts; judge the logits, the routing, and the distance to the reference."""
    embedding = embedding_of(subject)
    if embedding is None:
        yield NotChecked(("F01", "F02", "F03"), "no embedding was recognised, so there are no prompts")
        return
    rows = subject.tensors[embedding].shape[0]
    reference: Checkpoint | None = None
    base = reference_of(subject.object_or_none(PROVENANCE), subject.against)
    if base is not None:
        reference = open_checkpoint(base)
        theirs = plan_of(reference).anatomy.settings.first(("vocab_size",))
        if theirs != rows:
            yield NotChecked(("F02",), f"the reference has {theirs} words, this model {rows}")
            reference = None
    try:
        trace = run_prompts(subject.checkpoint, seeded_prompts(rows), reference)
    except SurgeryError as error:
        yield NotChecked(("F01", "F02", "F03"), error.message)
        return
    yield from _logits(trace)
    yield from _reached(subject, trace)
    if reference is not None:
        yield from _distance(subject, trace)


def _logits(trace: Trace) -> Iterator[Finding]:
    if trace.not_finite:
        yield finding("F01", f"the logits of {trace.not_finite} of {PROMPTS * LENGTH} tokens are not finite")
    elif trace.spread < ALIKE:
        yield finding("F01", "the logits are the same for every word")
    elif trace.movement < ALIKE:
        yield finding("F01", "the logits are the same at every position, whatever was said before")


def _reached(subject: Context, trace: Trace) -> Outcome:
    if not trace.chosen:
        if subject.anatomy.blocks:
            yield NotChecked(("F03",), "the routing of this model class cannot be observed")
        return
    unreached = 0
    for name, counts in trace.chosen.items():
        if sum(counts) < ENOUGH * len(counts):
            yield NotChecked(("F03",), f"{sum(counts)} choices are too few for {len(counts)} experts")
            return
        never = [expert for expert, count in enumerate(counts) if count == 0]
        unreached += len(never)
        if len(never) > len(counts) / 2:
            tokens = PROMPTS * LENGTH
            yield finding(
                "F03", f"{name}: {len(never)} of {len(counts)} experts were chosen by none of {tokens} tokens"
            )
    subject.measured["experts that random tokens did not reach"] = unreached


def _distance(subject: Context, trace: Trace) -> Outcome:
    """Compare with the reference. Without --tolerance it must be the same function, unless a recipe changed it."""
    subject.measured["largest difference of logits"] = trace.largest
    subject.measured["KL to the reference, nats per token"] = trace.divergence
    steps = recorded_steps(subject)
    if subject.tolerance is None and steps:
        yield NotChecked(("F02",), f"{', '.join(steps)} may change the logits: bound the KL with --tolerance")
        return
    allowed = SAME if subject.tolerance is None else subject.tolerance
    if not trace.divergence <= allowed:  # NaN too
        message = f"the KL to the reference is {trace.divergence:.4g} nats per token; {allowed:g} are allowed"
        yield finding("F02", message)
