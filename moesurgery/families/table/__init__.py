"""The family table. A new family is an entry here and a row in tests/families.py: docs/families.md.

Sources: transformers 5.24 modeling files and published checkpoints; `tests/unit/families/test_families.py` checks every
entry against a model that transformers builds, in every layout.
"""

from __future__ import annotations

from collections.abc import Collection

from moesurgery.checkpoint.gguf_files import MODEL_TYPE
from moesurgery.families.family import Family
from moesurgery.families.table.deepseek import DEEPSEEK
from moesurgery.families.table.gguf import gguf_family
from moesurgery.families.table.mixtral import MIXTRAL
from moesurgery.families.table.own import OWN
from moesurgery.families.table.qwen import QWEN
from moesurgery.families.table.remote import REMOTE
from moesurgery.families.table.sigmoid import SIGMOID

FAMILIES: tuple[Family, ...] = (*MIXTRAL, *QWEN, *DEEPSEEK, *SIGMOID, *OWN, *REMOTE)


def by_model_type(model_type: str) -> tuple[Family, ...]:
    """Return the entries for one `model_type` (two where architectures must decide)."""
    if model_type.startswith(MODEL_TYPE):
        return (gguf_family(model_type),)
    return tuple(family for family in FAMILIES if model_type in family.model_types)


def by_architecture(names: Collection[str]) -> tuple[Family, ...]:
    """Return the entries that only `architectures` can tell: their `model_type` is that of a dense family."""
    return tuple(family for family in FAMILIES if not family.model_types and set(names) & set(family.architectures))


__all__ = ["FAMILIES", "by_architecture", "by_model_type"]
