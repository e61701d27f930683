"""The shape of a mixture: the few numbers, the same in all MoE layers, that `moesurgery fit` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesurgery.checkpoint.dtypes import BITS, PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy, HasShape, MoeBlock

AS_STORED = "as stored"


@dataclass(frozen=True)
class WeightForm:
    """A form in which weights are stored: `bits` per weight, scales included, for the plain floats among them.

    `error` is the mean squared rounding error over the mean square of the weights. `dtype` is the word of
    `convert --dtype` that makes it.
    """

    name: str
    bits: float
    error: float
    dtype: str = ""


def _rounding(bits: int) -> float:
    """Return the mean squared relative error of rounding to `bits` significant bits, for values that are even in the
    logarithm: the step's square over 12, times the mean of 1/m^2 over mantissas m of 1 to 2, 3/(8 ln 2)."""
    return 4.0 ** (1 - bits) / 12 * 0.541


FORMS = {
    form.name: form
    for form in (
        WeightForm("float32", 32, _rounding(24), "float32"),
        WeightForm("bfloat16", 16, _rounding(8), "bfloat16"),
        WeightForm("float16", 16, _rounding(11), "float16"),
    )
}
USUAL_FORMS = ("bfloat16",)  # tried where none are named: float16 overflows above 65,504


@dataclass(frozen=True)
class MixtureShape:
    """Experts in each MoE layer, neurons in each expert, experts that a token is routed to, the stored form.

    `merged`: the experts that go are merged into others instead of dropped.
    """

    experts: int
    width: int
    top_k: int
    form: str = AS_STORED
    merged: bool = False

    @property
    def name(self) -> str:
        """A name for tables and files, as `e48-w56-k8`."""
        parts = [f"e{self.experts}-w{self.width}-k{self.top_k}"]
        parts += ["merged"] if self.merged else []
        return "-".join(parts if self.form == AS_STORED else [*parts, self.form])

    def within(self, other: MixtureShape, trained: int) -> bool:
        """Whether the other shape has at least as much of everything, in the same form: it is as good or better.

        Of two numbers of active experts the larger is better up to the `trained` one; above, neither is.
        """
        top_k = self.top_k == other.top_k or self.top_k < other.top_k <= trained
        return top_k and self.form == other.form and self.experts <= other.experts and self.width <= other.width


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
    """Return those forms of `names` that take fewer bits than the experts' weights do now."""
    stored = {tensors[m.name].dtype for b in anatomy.main_blocks for m in b.named("down") if m.stem.main}
    if not stored <= PLAIN_FLOATS:
        return []
    return [name for name in names if FORMS[name].bits < max(BITS[dtype] for dtype in stored)]
