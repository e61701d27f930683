"""The decoders between which weights can move: one entry per `model_type`, dense and mixture of experts.

An entry says where the type's config keeps each trait and what its code fixes (`traits`), which modules a layer has
besides its FFN, and how the FFN or the experts are stored on the Hub. Sources: the configuration and modeling files
of transformers 5.23. `tests/unit/decoders/test_architectures.py` holds every default to transformers' own, and
`tests/unit/surgery/test_upcycle_pairs.py` what the entries say of pairs to forward passes.
"""

from __future__ import annotations

from moesurgery.decoders.architecture import Architecture
from moesurgery.decoders.dense_types import DENSE_TYPES
from moesurgery.decoders.moe_types import MOE_TYPES
from moesurgery.errors import CheckpointError

_BY_TYPE = {entry.model_type: entry for entry in (*DENSE_TYPES, *MOE_TYPES)}


def architecture(model_type: str) -> Architecture | None:
    """Return the entry of a `model_type`, None where the table has none."""
    return _BY_TYPE.get(model_type)


def require_architecture(model_type: str) -> Architecture:
    """Return the entry of a `model_type`; raise CheckpointError where the table has none."""
    known = architecture(model_type)
    if known is None:
        raise CheckpointError(f"model_type {model_type!r} is not in the table of architectures")
    return known


__all__ = ["DENSE_TYPES", "MOE_TYPES", "architecture", "require_architecture"]
