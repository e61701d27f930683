"""F: a few seeded prompts through the model. What it takes of a model is the small interface `Engine`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import RefusedError, SurgeryError
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.provenance import recorded_steps
from moesurgery.validate.subject import Subject
from moesurgery.validate.vocabulary import embedding_of

if TYPE_CHECKING:
    import torch

PROMPTS, LENGTH, SEED = 8, 64, 0
ENOUGH = 20  # choices per expert before one that was never chosen counts: trained experts may wait for other words
SAME = 1e-3  # nats: what rounding may do to the logits of two forms of one model


@dataclass(frozen=True)
class Trace:
    """What a forward pass showed: logits [prompts, tokens, vocabulary], and how often each expert was chosen.

    `chosen` has, for each MoE layer in order, its name and a count per expert.
    """

    logits: torch.Tensor
    chosen: dict[str, list[int]]


Engine = Callable[[Checkpoint, "torch.Tensor"], Trace]


def whole_model(checkpoint: Checkpoint, prompts: torch.Tensor) -> Trace:
    """Run a model that fits into memory, with transformers' own code. Raises SurgeryError where it does not."""
    import torch

    from moesurgery.measure.perplexity import load_model

    if not isinstance(checkpoint.source, LocalSource):
        raise RefusedError("the model is remote")
    needed = 2 * checkpoint.stored_bytes if checkpoint.stored_bytes else 0
    if (free := _free_memory()) is not None and needed > 0.8 * free:
        raise RefusedError(f"the model needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    model = load_model(checkpoint.source.root)
    chosen: dict[str, list[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts") and isinstance(getattr(module, "num_experts", None), int):
            handles.append(module.register_forward_pre_hook(_counter(name, module.num_experts, chosen)))
    try:
        with torch.inference_mode():
            return Trace(model(prompts).logits.float(), chosen)
    finally:
        for handle in handles:
            handle.remove()


def _counter(name: str, experts: int, chosen: dict[str, list[int]]) -> Callable[..., None]:
    """Return a hook that counts the experts which a layer's router hands to its `experts` module."""

    def count(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        import torch

        if len(inputs) > 1 and not inputs[1].is_floating_point():
            found = torch.bincount(inputs[1].flatten(), minlength=experts)[:experts]
            chosen[name] = [a + b for a, b in zip(chosen.get(name, [0] * experts), found.tolist(), strict=True)]

    return count


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def seeded_prompts(rows: int) -> torch.Tensor:
    """Return token ids [prompts, tokens] over the whole vocabulary, the same for every model of `rows` tokens."""
    import torch

    return torch.randint(0, rows, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(SEED))


@check("F01", "F02", "F03")
def forward(subject: Subject, engine: Engine = whole_model) -> Outcome:
    """Run the prompts; judge the logits, the routing, and the distance to the reference."""
    embedding = embedding_of(subject)
    if embedding is None:
        yield NotChecked(("F01", "F02", "F03"), "no embedding was recognised, so there are no prompts")
        return
    prompts = seeded_prompts(subject.tensors[embedding].shape[0])
    try:
        trace = engine(subject.checkpoint, prompts)
    except SurgeryError as error:
        yield NotChecked(("F01", "F02", "F03"), error.message)
        return
    yield from _logits(trace)
    yield from _reached(subject, trace)
    if subject.against is None:
        return
    try:
        reference = engine(open_checkpoint(subject.against), prompts)
    except (SurgeryError, IndexError) as error:
        yield NotChecked(("F02",), f"the reference: {error}")
        return
    yield from _distance(subject, trace, reference)


def _logits(trace: Trace) -> Iterator[Finding]:
    logits = trace.logits
    if not bool(logits.isfinite().all()):
        count = int((~logits.isfinite()).any(dim=-1).sum())
        yield finding("F01", f"the logits of {count} of {logits.shape[0] * logits.shape[1]} tokens are not finite")
    elif float(logits.std(dim=-1).max()) < 1e-6:
        yield finding("F01", "the logits are the same for every word")
    elif float((logits - logits[:, :1]).abs().max()) < 1e-6 and logits.shape[1] > 1:
        yield finding("F01", "the logits are the same at every position, whatever was said before")


def _reached(subject: Subject, trace: Trace) -> Outcome:
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


def _distance(subject: Subject, trace: Trace, reference: Trace) -> Outcome:
    """Compare with the reference. Without --tolerance it must be the same function, unless a recipe changed it."""
    if trace.logits.shape != reference.logits.shape:
        mine, theirs = list(trace.logits.shape), list(reference.logits.shape)
        yield finding("F02", f"the logits have shape {mine}, the reference's {theirs}")
        return
    largest = float((trace.logits - reference.logits).abs().max())
    log_p, log_q = reference.logits.log_softmax(-1), trace.logits.log_softmax(-1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    subject.measured["largest difference of logits"] = largest
    subject.measured["KL to the reference, nats per token"] = divergence
    steps = recorded_steps(subject)
    if subject.tolerance is None and steps:
        yield NotChecked(("F02",), f"{', '.join(steps)} may change the logits: bound the KL with --tolerance")
        return
    allowed = SAME if subject.tolerance is None else subject.tolerance
    if not divergence <= allowed or math.isnan(largest):
        yield finding("F02", f"the KL to the reference is {divergence:.4g} nats per token; {allowed:g} are allowed")
