"""How much memory a run may use, and its split: loaded weights, hidden states, activations of a batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RecipeError

if TYPE_CHECKING:
    import torch

ROOM = 0.9  # of what is free on a GPU: fragmentation and the library's own buffers take the rest
ACTIVATIONS = 0.25  # of a budget, for one batch
GPU_BATCH_TOKENS = 65_536  # on a GPU: more tokens make no kernel faster
LOGITS = 1 / 16  # of a budget


@dataclass(frozen=True)
class Shape:
    """What a batch's memory depends on: hidden size, experts per token, their width, attention heads, bytes a number.

    `heads` is 0 where attention does not hold all pairs of positions in memory.
    """

    hidden: int
    top_k: int
    width: int
    heads: int
    itemsize: int

    def per_token(self, length: int) -> int:
        """Return about how many bytes a token of a window of `length` needs in a layer."""
        experts = self.top_k * (4 * self.hidden + 4 * self.width)
        return self.itemsize * (experts + 24 * self.hidden + 3 * self.heads * length)


def shape_of(config: Any, top_k: int, itemsize: int) -> Shape:
    """Return the shape that the config of transformers describes."""
    hidden = int(config.hidden_size)
    widths = [getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim")]
    width = next((w for w in widths if isinstance(w, int)), 4 * hidden)
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    return Shape(hidden, top_k, width, heads if config._attn_implementation == "eager" else 0, itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on a GPU, including torch's cached but unused memory."""
    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(ROOM * (torch.cuda.mem_get_info(device)[0] + held))


def parse_bytes(text: str) -> int:
    """Return a number of bytes given as 40GB, 512MiB or 1000000000. Raises RecipeError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(k|M|G|T|)(i?)B?", text.replace(" ", ""))
    value = 0
    if match is not None:
        number, unit, binary = match.groups()
        value = int(float(number) * (1024 if binary else 1000) ** ("kMGT".index(unit) + 1 if unit else 0))
    if value <= 0:
        raise RecipeError(f"--memory {text!r} is no amount of memory", "write it as 40GB or 512MiB")
    return value
