"""A model beside a machine: which shapes of it fit there, and whether any does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from moesurgery.budget.candidates import Choices, choices, fitting_shapes, taken_well
from moesurgery.budget.costs import Cost, ShapeCosts
from moesurgery.budget.limits import Limits
from moesurgery.budget.shape import FORMS, USUAL_FORMS, MixtureShape, narrower_forms
from moesurgery.count.accelerators import Accelerator
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.client_limits import moe_shape
from moesurgery.moe.neuron_axis import neurons_together


@dataclass(frozen=True)
class Budget:
    """The costs of a model's shapes, the limits, and what may be chosen."""

    costs: ShapeCosts
    limits: Limits
    choices: Choices

    @property
    def original(self) -> MixtureShape:
        return self.costs.shape

    @property
    def fits_already(self) -> bool:
        return self.limits.allow(self.costs.of(self.original))

    def shapes(self, memory: float = 1.0) -> list[tuple[MixtureShape, Cost]]:
        """Return the shapes that fit and that no other one contains, in `memory` times the memory."""
        limits = replace(self.limits, memory=int(self.limits.memory * memory))
        return fitting_shapes(self.costs, self.choices, limits, self.costs.of(self.original).active)

    def check(self) -> None:
        """Raise RefusedError where no shape fits, naming the smallest one and what to ask for."""
        if self.shapes():
            return
        smallest = self.choices.smallest(self.costs)
        cost = self.costs.of(smallest)
        wrong = self.limits.broken(cost)
        said, hints = [], []
        if "memory" in wrong or not wrong:
            said.append(
                f"the smallest takes {_bytes(cost.memory)}: {_bytes(cost.weight_bytes)} of weights and"
                f" {_bytes(cost.kv_bytes)} of KV cache, and {_bytes(self.limits.memory)} are given"
            )
            hints.append(f"--memory {_rounded_up(cost.memory)}")
            if cost.kv_bytes > self.limits.memory // 4:
                hints.append("a shorter --context")
        if "active" in wrong:
            said.append(f"the smallest has {cost.active:,} active parameters, above {self.limits.active:,}")
            hints.append(f"--active {cost.active / 1e6:.0f}M or more")
        if "speed" in wrong:
            said.append(
                f"the fastest decodes {cost.tokens_per_second:.1f} tokens per second, below {self.limits.speed:g}"
            )
            hints.append(f"--speed {int(cost.tokens_per_second or 0)}")
        raise RefusedError(f"fit: no shape of this model fits: {'; '.join(said)} ({smallest.name})", ", ".join(hints))


def budget_of(
    anatomy: Anatomy,
    tensors: Mapping[str, Expr],
    limits: Limits,
    *,
    context: int,
    batch: int,
    accelerator: Accelerator | None = None,
    axes: Collection[str],
    forms: Sequence[str] | None = None,
    engine: str | None = None,
    header_bytes: int = 0,
    tied: tuple[Anatomy, Mapping[str, Expr]] | None = None,
) -> Budget:
    """Return a model beside a machine; with `engine`, only with numbers that its kernels take well, in forms that it
    reads. Without `forms` the usual ones are tried. `tied` is the model with pairs of blocks tied, for the axis of that
    name.

    Raises RecipeError for a speed without an accelerator, for an engine of which nothing is known and for forms that it
    does not read, RefusedError where the model has no experts or is of an unknown family, or its width cannot change.
    """
    if limits.speed is not None and accelerator is None:
        raise RecipeError("--speed needs to know of which machine", "give --accelerator")
    costs: ShapeCosts | None = None
    for one in (tied, (anatomy, tensors)):
        if one is not None:
            costs = ShapeCosts(
                *one, context=context, batch=batch, accelerator=accelerator, header_bytes=header_bytes, tied=costs
            )
    assert costs is not None
    if "width" in axes and (reason := anatomy.settings.family.refuses.get("slim-experts")):
        raise RefusedError(f"fit: {anatomy.settings.family.name}: its width stays: {reason}", "give --keep width")
    try:
        together = neurons_together(anatomy.main_blocks[0], tensors) if "width" in axes else 1
    except RefusedError as error:
        raise RefusedError(f"fit: the width stays: {error.message}", f"give --keep width; or {error.hint}") from None
    narrower = narrower_forms(anatomy, tensors, _read_forms(forms, engine))
    chosen = choices(anatomy, costs.shape, axes, narrower, together)
    if engine is not None:
        chosen = taken_well(chosen, replace(moe_shape(anatomy), width=costs.shape.width), engine)
    return Budget(costs, limits, chosen)


def _read_forms(forms: Sequence[str] | None, engine: str | None) -> list[str]:
    """Return the forms to try that an engine reads, of those that are named or of the usual ones."""
    unread = [
        name
        for name in forms or USUAL_FORMS
        if engine and (form := FORMS[name].quantised) is not None and engine not in form.readers
    ]
    if forms and unread:
        raise RecipeError(
            f"--forms: {engine} does not read {', '.join(unread)}", "docs/quantised.md has who reads what"
        )
    return [name for name in forms or USUAL_FORMS if name not in unread]


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _rounded_up(count: int) -> str:
    """Return bytes as an option takes them, rounded up to two decimals of GB, or of MB where they are few."""
    unit, size = ("GB", 10**7) if count >= 10**9 else ("MB", 10**4)
    return f"{-(-count // size) / 100:g}{unit}"
