"""Adapters for MoE blocks whose code calls no module with chosen experts and their weights.

An adapter returns which experts the block's own router chose and with what weights, and computes the output of given
experts from the block's own parameters: an expert's input, its first projection, its gate and its down-projection, as
in `forward.activations`.

* Llama 4 multiplies an expert's input by its score, runs every expert on every token, with zeros as input where it was
  not chosen, and sums the outputs. So an expert is f(score(x) x), a function of the token alone, and its weight is 1.
* JetMoE sorts tokens by expert and multiplies each output by its weight.

Blocks that no adapter can read are in `UNREAD`, with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from moesurgery.forward.experts_module import RoutingTensors

UNREAD = {
    "JetMoeMoA": "an attention expert's output depends on the other tokens, so it has none of its own",
    "DogeCDMoE": "its code mixes the router's logits of the tokens of a batch, so what it routes here is not what it"
    " routes when it writes token by token",
}


class RoutingAdapter(Protocol):
    """Access to one class of blocks. `block` is the module; hidden states are [T, H], or as the block gets them."""

    def routing(self, block: Any, hidden: torch.Tensor) -> RoutingTensors:
        """Return the experts [T, k] that the block's router chooses for hidden states [T, H], and weights [T, k]."""

    def reads(self, block: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input [t, H] of an expert's first projection, for the block's input [t, H]."""

    def first(self, block: Any, expert: int) -> torch.Tensor:
        """Return an expert's first projection [2 I, H]: a view, to be changed in place."""

    def gated(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        """Return the input [t, I] of the down-projection, for the first projection's output [t, 2 I]."""

    def down(self, block: Any, expert: int) -> torch.Tensor:
        """Return an expert's down-projection [H, I]: a view, to be changed in place."""

    def returned(self, block: Any, hidden: torch.Tensor, routed: torch.Tensor) -> Any:
        """Return the block's return value for the routed output `routed` [T, H]."""


class _Llama4:
    def routing(self, block: Any, hidden: torch.Tensor) -> RoutingTensors:
        import torch

        _, logits = block.router(hidden)
        index = logits.topk(block.top_k, dim=1).indices
        return index, torch.ones_like(index, dtype=hidden.dtype)

    def reads(self, block: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ block.router.weight[expert]
        return hidden * logits.float().sigmoid().to(hidden.dtype)[:, None]  # type: ignore[no-any-return]

    def first(self, block: Any, expert: int) -> torch.Tensor:
        return block.experts.gate_up_proj[expert].T  # type: ignore[no-any-return]

    def gated(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return up * block.experts.act_fn(gate)  # type: ignore[no-any-return]

    def down(self, block: Any, expert: int) -> torch.Tensor:
        return block.experts.down_proj[expert].T  # type: ignore[no-any-return]

    def returned(self, block: Any, hidden: torch.Tensor, routed: torch.Tensor) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return block.shared_expert(hidden) + routed, block.router(hidden)[1]


class _JetMoe:
    def routing(self, block: Any, hidden: torch.Tensor) -> RoutingTensors:
        import torch

        order, _, gates, sizes, _ = block.router(hidden)
        index, weights = torch.empty_like(order), torch.empty_like(gates)
        index[order] = torch.repeat_interleave(torch.tensor(sizes, device=order.device))
        weights[order] = gates
        return index.view(len(hidden), -1), weights.view(len(hidden), -1)

    def reads(self, block: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def first(self, block: Any, expert: int) -> torch.Tensor:
        return block.input_linear.weight[expert]  # type: ignore[no-any-return]

    def gated(self, block: Any, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return block.activation(gate) * up  # type: ignore[no-any-return]

    def down(self, block: Any, expert: int) -> torch.Tensor:
        return block.output_linear.weight[expert]  # type: ignore[no-any-return]

    def returned(self, block: Any, hidden: torch.Tensor, routed: torch.Tensor) -> Any:
        return routed.view(hidden.shape) + block.bias


_ADAPTERS: dict[str, RoutingAdapter] = {"Llama4TextMoe": _Llama4(), "JetMoeMoE": _JetMoe()}


def adapter_of(module: Any) -> RoutingAdapter | None:
    """Return the adapter of a block's module; None where it needs none or there is none."""
    return _ADAPTERS.get(type(module).__name__)


def routed(block: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the routed output [T, H] of an adapted block, for chosen experts [T, k], weights [T, k], inputs [T, H]."""
    import torch

    adapter = _ADAPTERS[type(block).__name__]
    out = torch.zeros_like(hidden)
    for expert in sorted(set(index.reshape(-1).tolist())):
        token, slot = torch.where(index == expert)
        projected = adapter.reads(block, expert, hidden[token]) @ adapter.first(block, expert).T
        output = adapter.gated(block, projected) @ adapter.down(block, expert).T
        out.index_add_(0, token, output * weights[token, slot, None])
    return out
