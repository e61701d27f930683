"""What depends on the number of experts: top-k, groups, the count in config.json, quantisation lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.config_keys import EXPERTS_KEYS, with_value
from moesurgery.families.quantisation_settings import with_renamed_settings


def check_blocks(anatomy: Anatomy, operation: str) -> int:
    """Return the number of experts of every block, prediction layers too; raise RefusedError where they differ."""
    count = anatomy.experts
    for block in anatomy.blocks:
        if block.experts != count:
            raise RefusedError(
                f"{operation}: {block.where} has {block.experts} experts, the other layers {count};"
                " config.json has one number for all"
            )
    return count


def check_remaining(anatomy: Anatomy, operation: str, remaining: int) -> None:
    """Refuse fewer experts than a token is routed to, or than the router's groups need."""
    settings = anatomy.settings
    top_k = settings.top_k
    if top_k is not None and top_k > remaining:
        hint = (
            f"lower it first in the same recipe: `- rescale: {{top_k: {max(remaining, 1)}}}` before `- {operation}: …`"
        )
        if settings.family.routing.fixed_top_k is not None:
            hint = f"{settings.family.name} always uses top-{top_k}: keep at least {top_k} experts"
        raise RefusedError(
            f"{operation}: {remaining} experts would be left in each layer, and each token is routed to {top_k}", hint
        )
    if settings.groups is None:
        return
    count, kept = settings.groups
    if remaining % count:
        raise RefusedError(
            f"{operation}: {remaining} experts do not divide into the router's {count} groups",
            f"leave a multiple of {count} experts, as many in each group",
        )
    if settings.family.routing.groups == "top2" and remaining // count < 2:
        raise RefusedError(
            f"{operation}: {remaining} experts in {count} groups leave one per group, and this router scores a group"
            " by its two best",
            f"leave at least {2 * count} experts",
        )
    reachable = kept * remaining // count
    if top_k is not None and top_k > reachable:
        raise RefusedError(
            f"{operation}: with {remaining} experts left, routing reaches {reachable} ({kept} of {count} groups),"
            f" fewer than the top-{top_k}",
            f"lower it first in the same recipe: `- rescale: {{top_k: {reachable}}}` before `- {operation}: …`",
        )


def equal_count(operation: str, kept: Mapping[str, Sequence[Any]]) -> int:
    """Return how many experts each block keeps; raise RefusedError where they differ."""
    first = next(iter(kept))
    for where, experts in kept.items():
        if len(experts) != len(kept[first]):
            raise RefusedError(
                f"{operation}: {len(kept[first])} experts are left in {first}, {len(experts)} in {where};"
                " config.json has one number for all layers",
                "leave as many in every MoE layer (prediction layers too)",
            )
    return len(kept[first])


def check_groups(anatomy: Anatomy, operation: str, kept: Mapping[str, Sequence[int]]) -> None:
    """Refuse where the experts that a block keeps, by their old numbers, are not as many in each router group."""
    if anatomy.settings.groups is None:
        return
    count = anatomy.settings.groups[0]
    size = anatomy.experts // count
    for where, experts in kept.items():
        left = [sum(e // size == group for e in experts) for group in range(count)]
        if len(set(left)) > 1:
            raise RefusedError(
                f"{operation}: {where} is routed in {count} groups of {size}, in which"
                f" {', '.join(map(str, left))} experts would be left",
                "leave as many in each group",
            )


def with_expert_count(anatomy: Anatomy, count: int, modules: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the config with `count` experts under every alias of the key.

    `modules` gives the new name of each renumbered expert module, None for those that are removed: quantisation
    settings list modules by name. Raises RefusedError where they match expert numbers by a regular expression.
    """
    config = with_value(anatomy.settings, EXPERTS_KEYS, count, anatomy.settings.family.experts_key)
    return with_renamed_settings(config, modules)
