"""The numbers of an upcycled layer, and why its output at step 0 is the dense FFN's.

F(x) = D (act(G x) * U x) is the dense FFN. Its I neurons are cut into `granularity` slices; `groups` copies of all
slices are the experts; all slices of a group share one router row. With a top-k that is a multiple of the granularity
the chosen experts are always whole groups, so every slice is used top_k / granularity times and

    routed(x) = S(x) / granularity * F(x),

S(x) being the sum of the chosen gates. So down-projections take the factor granularity / S. A shared expert that
carries the share a of F takes a / s (s: what the type multiplies it by), the routed ones another 1 - a. Only the
down-projection may take a factor: the activation is not homogeneous. With granularity 1 this is sparse upcycling
(Komatsuzaki et al., arXiv 2212.05055), with more it is the virtual group initialisation of He et al. (arXiv
2410.07524), whose factors on gate and up are not exact for gated activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moesurgery.decoders.architecture import Moe
from moesurgery.errors import RefusedError
from moesurgery.families.config_keys import Settings
from moesurgery.families.family import Family, Flag

Split = Literal["random", "clusters"]


@dataclass(frozen=True)
class Design:
    """How the experts of every layer follow from the dense FFN.

    `share` is what a shared expert carries of the FFN. `split`: the experts are the parts of one FFN, none is a copy.
    `renormalised`: the chosen gates are divided by their sum. `top_k` experts per token of `experts`.
    """

    experts: int
    top_k: int
    granularity: int
    share: float
    split: Split | None
    renormalised: bool
    score: str

    @property
    def groups(self) -> int:
        """How many sets of slices there are: experts that differ in their source, not in their neurons."""
        return 1 if self.split else self.experts // self.granularity

    @property
    def parts(self) -> int:
        """Into how many parts the neurons of an FFN are divided."""
        return self.experts if self.split else self.granularity

    @property
    def gate_sum(self) -> float:
        """S where it is the same for every token; otherwise its value with a router of zeros."""
        if self.renormalised:
            return 1.0
        return self.top_k / 2 if self.score == "sigmoid" else self.top_k / self.experts

    @property
    def routed_factor(self) -> float:
        """The factor on the experts' down-projections.

        A split FFN has every neuron once: the factor top_k makes each chosen expert count fully, as it did in the
        dense FFN, which is the best sum of parts that hardly overlap; with all experts chosen it is exact.
        """
        whole = self.top_k if self.split else self.granularity
        return (1.0 - self.share) * whole / self.gate_sum

    def why_exact(self) -> str:
        """Say in one line why the routed sum is the FFN."""
        if self.split:
            return f"all {self.experts} parts of the FFN are chosen, with equal gates"
        gates = "gates that sum to 1" if self.renormalised else f"equal gates, {self.gate_sum:g} together"
        if self.granularity == 1:
            text = f"the {self.top_k} chosen of {self.experts} equal experts get {gates}"
        else:
            sets = self.top_k // self.granularity
            text = (
                f"the {self.top_k} chosen experts are always {sets} whole {'group' if sets == 1 else 'groups'} of"
                f" {self.granularity} slices, with {gates}"
            )
        if self.share:
            text += f"; the shared expert carries {self.share:g} of the FFN"
        return text


def check_design(design: Design, width: int) -> None:
    """Refuse what cannot be built. `width` is that of the dense FFN."""
    if design.top_k > design.experts:
        raise RefusedError(
            f"upcycle: top-k {design.top_k} of {design.experts} experts is impossible",
            f"choose --top-k up to {design.experts}",
        )
    if design.split is None and design.experts % design.granularity:
        raise RefusedError(
            f"upcycle: {design.experts} experts are no whole groups of {design.granularity} slices",
            f"choose a multiple: --experts {-(-design.experts // design.granularity) * design.granularity}",
        )
    if design.split is None and design.top_k % design.granularity:
        nearest = -(-design.top_k // design.granularity) * design.granularity
        raise RefusedError(
            f"upcycle: with top-k {design.top_k} a token would miss some of the {design.granularity} slices of its FFN",
            f"choose a multiple: --top-k {nearest}",
        )
    if width % design.parts:
        raise RefusedError(
            f"upcycle: the FFN has {width} neurons, which {design.parts} does not divide",
            "choose another number of parts",
        )


def design_for(
    moe: Moe,
    family: Family,
    *,
    experts: int,
    top_k: int,
    granularity: int,
    share: float | None,
    split: Split | None,
    renormalise: bool,
) -> Design:
    """Return the design for one target; raise RefusedError where the target cannot have it."""
    flag = family.routing.renormalised
    if not renormalise and not isinstance(flag, Flag):
        raise RefusedError(
            f"upcycle: {family.name} always makes the chosen gates sum to 1", "leave out --no-renormalise"
        )
    shared = moe.shared
    if moe.input_gates:
        if share not in (None, 1.0) or granularity != 1 or split:
            raise RefusedError(
                f"upcycle: {family.name} multiplies the experts' input by the gates, so only its shared expert can be"
                " the FFN: all of it, in one piece",
                "use --shared-expert 1 without --granularity and --split, or another --to",
            )
        share = 1.0
    if share and shared is None:
        raise RefusedError(f"upcycle: {family.name} has no shared expert", "choose another --to")
    if share and split:
        raise RefusedError("upcycle: --split leaves no FFN for a shared expert", "use --granularity instead")
    if share and shared is not None and not shared.width and not shared.count and granularity != 1:
        raise RefusedError(
            f"upcycle: the shared expert of {family.name} is as wide as an expert, so it holds a whole FFN only with"
            " --granularity 1",
            "leave out --shared-expert or --granularity",
        )
    score = Settings(family, moe.settings).score
    renormalised = score == "top-softmax" or renormalise
    return Design(experts, top_k, granularity, share or 0.0, split, renormalised, score)


def router_settings(design: Design, family: Family) -> dict[str, Any]:
    """Return the config keys of the routing: counts, and whether gates are renormalised."""
    settings: dict[str, Any] = {family.experts_key: design.experts, family.top_k_key: design.top_k}
    if isinstance(family.routing.renormalised, Flag):
        settings[family.routing.renormalised.keys[0]] = design.renormalised
    return settings
