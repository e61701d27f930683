"""Which experts are alike: what merging groups them by, from statistics of a run over text.

router_cosine   cosine of two experts' router logits over the tokens (M-SMoE, arXiv 2310.01334)
ream_likeness   the mean of (1 + cosine of the experts' mean gated outputs) / 2 and 1 - d / (largest d), d the
                distance of their router logits over the tokens, each at length one (REAM, arXiv 2604.04356)
mean_outputs    each expert's mean output over all tokens, to be clustered by distance (HC-SMoE, arXiv 2410.08589)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.stats.statistics_file import BlockStats

if TYPE_CHECKING:
    import numpy as np


def router_cosine(block: BlockStats) -> np.ndarray:
    """Return the cosine [E, E] of router logits. Raises RefusedError where they were not recorded."""
    gram = block.total("logits")
    if not gram.any():
        raise RefusedError(
            f"{block.where}: its router is not one matrix, so its logits were not seen", "use --group hc, or --groups"
        )
    return _cosine(gram)


def ream_likeness(block: BlockStats) -> np.ndarray:
    """Return REAM's similarity [E, E], from 0 to 1. Needs the sums of every expert on every token."""
    import numpy as np

    distance = np.sqrt(np.maximum(2 - 2 * router_cosine(block), 0))
    gated = block.total("gated_all")
    alike = (1 + _cosine(gated @ gated.T)) / 2
    likeness: np.ndarray = (alike + 1 - distance / max(distance.max(), 1e-30)) / 2
    return likeness


def mean_outputs(block: BlockStats) -> np.ndarray:
    """Return the mean output [E, H] of each expert. Needs the sums of every expert on every token."""
    means: np.ndarray = block.total("output_all") / max(float(block.total("tokens")), 1)
    return means


def _cosine(gram: np.ndarray) -> np.ndarray:
    """Return the cosines of vectors from their inner products [E, E]; 0 with a vector that is zero."""
    import numpy as np

    lengths = np.sqrt(np.maximum(np.diag(gram), 0))
    product = np.outer(lengths, lengths)
    cosines: np.ndarray = np.divide(gram, product, out=np.zeros_like(gram), where=product > 0)
    return cosines.clip(-1, 1)
