"""The shape of a mixture: the few numbers, the same in all MoE layers, that `moesurgery fit` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesurgery.budget.expert_matrices import can_be_quantised, expert_matrices
from moesurgery.checkpoint.dtypes import BITS, PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy, HasShape, MoeBlock
from moesurgery.plan.written_forms import WRITTEN_FORMS, WrittenForm

AS_STORED = "as stored"


@dataclass(frozen=True)
class WeightForm:
    """A form in which weights are stored: `bits` per weight, scales included. Quantised ones are of routed experts.

    `error` is the mean squared rounding error over the mean square of the weights, for normal ones where it is a
    quantised form. `step` are the parameters of the `convert` that makes it.
    """

    name: str
    bits: float
    error: float
    step: Mapping[str, str]

    @property
    def quantised(self) -> WrittenForm | None:
        return WRITTEN_FORMS.get(self.name)


def _rounding(bits: int) -> float:
    """Return the mean squared relative error of rounding to `bits` significant bits, for values that are even in the
    logarithm: the step's square over 12, times the mean of 1/m^2 over mantissas m of 1 to 2, 3/(8 ln 2)."""
    return 4.0 ** (1 - bits) / 12 * 0.541


FORMS = {
    form.name: form
    for form in (
        WeightForm("float32", 32, _rounding(24), {"dtype": "float32"}),
        WeightForm("bfloat16", 16, _rounding(8), {"dtype": "bfloat16"}),
        WeightForm("float16", 16, _rounding(11), {"dtype": "float16"}),
        WeightForm("fp8", 8, 0.0007, {"quantize": "fp8"}),
        WeightForm("fp8-block", 8, 0.0007, {"quantize": "fp8-block"}),
        WeightForm("nvfp4", 4.5, 0.0091, {"quantize": "nvfp4"}),
        WeightForm("int4", 4.5, 0.0090, {"quantize": "int4"}),
        WeightForm("mxfp4", 4.25, 0.0125, {"quantize": "mxfp4"}),
    )
}
BESIDE = "bfloat16"  # what everything else becomes where experts are wider and become quantised
USUAL_FORMS = ("bfloat16", "fp8", "int4")  # tried where none are named: float16 overflows above 65,504


@dataclass(frozen=True)
class MixtureShape:
    """Experts in each MoE layer, neurons in each expert, experts that a token is routed to, the stored form.

    `merged`: the experts that go are merged into others instead of dropped. `tied`: pairs of neighbouring blocks run
    with the weights of the first.
    """

    experts: int
    width: int
    top_k: int
    form: str = AS_STORED
    merged: bool = False
    tied: bool = False

    @property
    def name(self) -> str:
        """A name for tables and files, as `e48-w56-k8`."""
        parts = [f"e{self.experts}-w{self.width}-k{self.top_k}"]
        parts += [word for word in ("merged", "tied") if getattr(self, word)]
        return "-".join(parts if self.form == AS_STORED else [*parts, self.form])

    def within(self, other: MixtureShape, trained: int) -> bool:
        """Whether the other shape has at least as much of everything: it is as good or better.

        Of two numbers of active experts the larger is better up to the `trained` one; above, neither is. Of two forms
        the one of more bits is better where it rounds less.
        """
        top_k = self.top_k == other.top_k or self.top_k < other.top_k <= trained
        form = self.form == other.form or _better(other.form, self.form)
        tied = self.tied or not other.tied
        return tied and top_k and form and self.experts <= other.experts and self.width <= other.width


def _better(form: str, than: str) -> bool:
    if AS_STORED in (form, than):
        return form == AS_STORED  # all that are chosen from are narrower
    return FORMS[form].bits > FORMS[than].bits and FORMS[form].error <= FORMS[than].error


def mixture_shape(anatomy: Anatomy) -> MixtureShape:
    """Return the shape of a model as it is.

    Raises RefusedError where its layers have experts of different widths, or config.json has no top-k.
    """
    anatomy.require_family("fit")
    widths = {block.where: width_of(anatomy, block) for block in anatomy.main_blocks}
    if len(set(widths.values())) > 1:
        raise RefusedError(
            f"fit: the experts have different widths: {', '.join(f'{w} in {b}' for b, w in widths.items())}",
            "use drop-experts or merge-experts instead",
        )
    top_k = anatomy.settings.top_k
    if top_k is None:
        raise RefusedError("fit: config.json does not say how many experts a token is routed to")
    return MixtureShape(anatomy.experts, next(iter(widths.values())), top_k)


def width_of(anatomy: Anatomy, block: MoeBlock) -> int:
    """Return the neurons of each expert of a block: the input width of its down-projections."""
    down = next(m for m in block.named("down") if m.stem.main and not m.stem.bias)
    experts = block.experts if down.expert is None else 1
    return anatomy.parameters[down.name] // (experts * (anatomy.settings.hidden or 1))


def narrower_forms(anatomy: Anatomy, tensors: Mapping[str, HasShape], names: Sequence[str] = USUAL_FORMS) -> list[str]:
    """Return those forms of `names` that take fewer bits than the experts' weights do now, and that they can have."""
    stored = {tensors[m.name].dtype for b in anatomy.main_blocks for m in b.named("down") if m.stem.main}
    if not stored <= PLAIN_FLOATS or "convert" in anatomy.settings.family.refuses:
        return []
    bits = max(BITS[dtype] for dtype in stored)
    matrices = expert_matrices(anatomy, tensors)
    return [
        name
        for name in names
        if FORMS[name].bits < bits
        and ((form := FORMS[name].quantised) is None or can_be_quantised(anatomy, matrices, name, form))
    ]
