"""A plan as programs read it that leave experts out while they load a model: vLLM's pull requests and their like.

vllm         {"version": 1, "model": NAME, "pruned_experts": [[layer, expert], …]}
             `vllm serve --riy-expert-profile FILE` (github.com/vllm-project/vllm/pull/37824, open)
vllm-ascend  a line {"0": [all experts, the best first]} for each layer, and a share to prune
             `--additional-config '{"expert_list_file": FILE, "expert_prune_ratio": SHARE}'`
             (github.com/vllm-project/vllm-ascend/pull/12525, open, Qwen3)
plain        {"0": [kept experts], …}: what patches for SGLang read, and what pruned models for MLX are published
             with as reap_kept_experts.json
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import RefusedError
from moesurgery.stats.plan_file import LayerPlan, PlanFile

_NUMBER = re.compile(r"(.*)\.([0-9]{1,9})")


class KeepList(NamedTuple):
    """The text of a file, and what is to be said about it."""

    text: str
    notes: tuple[str, ...]


def keep_list(plan: PlanFile, reader: str) -> KeepList:
    """Return a plan of our own format as one of `READERS` takes it.

    Layers are called by their numbers; those of a further stack (prediction layers) are left out. Raises RefusedError
    where the plan does not keep experts of its layers, or not as the reader wants.
    """
    if not plan.about:
        raise RefusedError(
            f"{plan.path} is no plan of moesurgery's, so it does not say how many experts there are",
            f"carry it out with `moesurgery drop-experts MODEL --plan {plan.path}`",
        )
    numbered: dict[int, tuple[str, LayerPlan]] = {}
    stacks: list[str] = []
    left_out = []
    for where, entry in plan.layers.items():
        matched = _NUMBER.fullmatch(where)
        if matched is None or entry.keep is None:
            reason = "has no number" if matched is None else "keeps no experts, it merges them or is about neurons"
            raise RefusedError(f"{plan.path}: {where} {reason}", "a keep list is for plans of drop-experts")
        stacks.append(matched[1])
        if matched[1] == stacks[0]:
            numbered[int(matched[2])] = where, entry
        else:
            left_out.append(where)
    text, notes = READERS[reader](plan, {number: entry for number, (_, entry) in numbered.items()})
    if left_out:
        notes = (*notes, f"left out, for their numbers are those of other layers: {', '.join(left_out)}")
    return KeepList(text, notes)


def _vllm(plan: PlanFile, layers: Mapping[int, LayerPlan]) -> KeepList:
    pruned = [[layer, e] for layer, entry in layers.items() for e in _dropped(entry)]
    profile = {"version": 1, "model": str(plan.about["model"].get("name")), "pruned_experts": pruned}
    return KeepList(compact_json(profile) + "\n", ("vllm serve MODEL --riy-expert-profile FILE (vLLM, PR 37824)",))


def _vllm_ascend(plan: PlanFile, layers: Mapping[int, LayerPlan]) -> KeepList:
    lines = []
    shares = set()
    for layer, entry in layers.items():
        scores = _scores(plan, layer, entry)
        kept = sorted(entry.keep or (), key=lambda e: (-scores[e], e))
        dropped = sorted(_dropped(entry), key=lambda e: (-scores[e], e))
        lines.append(compact_json({str(layer): [*kept, *dropped]}))
        shares.add(len(dropped) / len(scores))
    if len(shares) > 1:
        raise RefusedError(
            f"{plan.path} keeps different numbers of experts in its layers; vllm-ascend prunes one share of all",
            "use --for vllm",
        )
    return KeepList("\n".join(lines) + "\n", (f'"expert_prune_ratio": {shares.pop():g} (vllm-ascend, PR 12525)',))


def _plain(plan: PlanFile, layers: Mapping[int, LayerPlan]) -> KeepList:
    return KeepList(compact_json({str(layer): sorted(entry.keep or ()) for layer, entry in layers.items()}) + "\n", ())


READERS: Mapping[str, Callable[[PlanFile, Mapping[int, LayerPlan]], KeepList]] = {
    "vllm": _vllm,
    "vllm-ascend": _vllm_ascend,
    "plain": _plain,
}


def _dropped(entry: LayerPlan) -> list[int]:
    stay = set(entry.keep or ())
    return [e for e in range(entry.experts or 0) if e not in stay]


def _scores(plan: PlanFile, layer: int, entry: LayerPlan) -> list[float]:
    if entry.scores is None or len(entry.scores) != entry.experts:
        raise RefusedError(
            f"{plan.path}: layer {layer} has no score for each expert, and vllm-ascend wants all in order",
            "make the plan by a criterion (--keep 75% --by …), or use --for vllm",
        )
    return entry.scores
