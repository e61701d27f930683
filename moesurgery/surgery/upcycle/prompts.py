"""Router rows from prompts: what an expert should be chosen for, in the space that the router reads.

A row is the unit vector along the mean state of an expert's prompts, less that of its negative prompts. `hidden`
takes the state that the layer's router will see at each prompt's last token, after the post-attention norm,
`hidden_avg` the mean over its tokens; `cheap_embed` sums the prompts' embeddings and needs no forward pass.
(mergekit-moe has the same modes; its `hidden` takes the residual stream before attention and without the norm.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.checkpoint.filenames import TOKENIZER_FILES
from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.forward.model_config import harmless
from moesurgery.forward.tokens import Tokens, padded
from moesurgery.plan.plan import Plan
from moesurgery.surgery.upcycle.dense_model import DenseModel

if TYPE_CHECKING:
    import torch

PromptMode = Literal["hidden", "hidden_avg", "cheap_embed"]


@dataclass(frozen=True)
class Prompts:
    """What one group of experts should be chosen for, and what not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """The prompts of several experts. `owner[i]` is (expert, positive) of prompt i."""

    tokens: Tokens
    owner: tuple[tuple[int, bool], ...]

    @property
    def mask(self) -> torch.Tensor:
        """True for real tokens [prompts, tokens]."""
        import torch

        return self.tokens.mask if self.tokens.mask is not None else torch.ones_like(self.tokens.ids, dtype=torch.bool)

    def of(self, expert: int, positive: bool) -> list[int]:
        return [i for i, owner in enumerate(self.owner) if owner == (expert, positive)]


@dataclass(frozen=True)
class PromptRows:
    """Float32 router rows [layers, experts, H], and the load that the prompts would give the experts of each layer.

    `loads[layer][expert]` is a share of the tokens; `tokens` says which, for people.
    """

    rows: torch.Tensor
    loads: list[list[float]]
    tokens: str


def rows_from_prompts(dense: DenseModel, prompts: Sequence[Prompts], mode: PromptMode, top_k: int) -> PromptRows:
    """Return the router rows for each expert's prompts. Raises CheckpointError without a tokenizer."""
    batch = tokenise(dense.plan, prompts)
    if mode == "cheap_embed":
        return _from_embeddings(dense, batch, len(prompts), top_k)
    return _from_states(dense, batch, len(prompts), top_k, average=mode == "hidden_avg")


def tokenise(plan: Plan, prompts: Sequence[Prompts]) -> Batch:
    """Tokenise all prompts with the model's own tokenizer, each after its first token (BOS) where it has one."""
    tokenizer = _tokenizer(plan)
    owner, token_ids = [], []
    for expert, entry in enumerate(prompts):
        for positive, texts in ((True, entry.positive), (False, entry.negative)):
            for text in texts:
                ids = tokenizer.encode((tokenizer.bos_token or "") + text, add_special_tokens=False)
                if not ids:
                    raise RefusedError(f"upcycle: the prompt {text!r} has no tokens")
                owner.append((expert, positive))
                token_ids.append(ids)
    return Batch(padded(token_ids), tuple(owner))


def _tokenizer(plan: Plan) -> Any:
    import transformers

    source = plan.checkpoint.source
    present = [file for file in TOKENIZER_FILES if file in plan.checkpoint.file_sizes]
    if not present:
        raise CheckpointError(
            f"{source.identity} has no tokenizer, which prompts need", "copy tokenizer.json beside the model"
        )
    automatic: Any = transformers.AutoTokenizer
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(compact_json(harmless(plan.config)))
        for file in present:
            Path(folder, file).write_bytes(source.read(file, 0, plan.checkpoint.file_sizes[file]))
        try:
            return automatic.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"the tokenizer of {source.identity} cannot be loaded: {reason[0] if reason else error!r}"
            ) from None


def _from_embeddings(dense: DenseModel, batch: Batch, experts: int, top_k: int) -> PromptRows:

    from moesurgery.forward.ffn_inputs import embeddings

    embedded = embeddings(dense.plan, batch.tokens.ids)
    mask = batch.mask

    def summed(prompts: list[int]) -> torch.Tensor:
        # Padded no further than these prompts need: so float32 sums are mergekit's to the bit.
        longest = int(mask[prompts].sum(dim=1).max())
        real = embedded[prompts, :longest] * mask[prompts, :longest].unsqueeze(-1)
        return unit(real.sum(dim=1).sum(dim=0))

    rows = _rows(batch, experts, summed)
    layers = len(dense.layers)
    flat = embedded[mask]
    flat = flat / flat.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
    return PromptRows(
        rows.expand(layers, -1, -1), [_load(rows, flat, top_k)] * layers, "the prompts' embeddings, normalised"
    )


def _from_states(dense: DenseModel, batch: Batch, experts: int, top_k: int, *, average: bool) -> PromptRows:
    import torch

    from moesurgery.forward.ffn_inputs import ffn_inputs

    assert dense.architecture.ffn is not None
    mask = batch.mask
    lengths = mask.sum(dim=1)
    rows, loads = [], []
    for state in ffn_inputs(dense.plan, batch.tokens, dense.architecture.ffn.root):
        if average:
            of_prompt = (state * mask.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)
        else:
            of_prompt = state[torch.arange(len(state)), lengths - 1]
        rows.append(_rows(batch, experts, partial(_mean, of_prompt)))
        loads.append(_load(rows[-1], state[mask], top_k))
    return PromptRows(torch.stack(rows), loads, "all tokens of the prompts")


def _rows(batch: Batch, experts: int, together: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Return the unit rows [experts, H]: each what an expert's prompts come to, less what its negative ones do."""
    import torch

    rows = []
    for expert in range(experts):
        row = together(batch.of(expert, True))
        if against := batch.of(expert, False):
            row = row - together(against)
        rows.append(unit(row))
    return torch.stack(rows)


def _mean(of_prompt: torch.Tensor, prompts: list[int]) -> torch.Tensor:
    return of_prompt[prompts].mean(dim=0)


def unit(row: torch.Tensor) -> torch.Tensor:
    """Return a vector at length 1 (or zeros as they are)."""
    length: torch.Tensor = row.norm(dim=-1, keepdim=True)
    return row / length.clamp(min=1e-8)


def _load(rows: torch.Tensor, states: torch.Tensor, top_k: int) -> list[float]:
    """Return the share of `states` [tokens, H] that each expert would get; 1 / experts is balanced."""
    chosen = (states @ rows.T).topk(top_k, dim=-1).indices.flatten()
    counts = chosen.bincount(minlength=len(rows)).double()
    return [float(share) for share in counts / counts.sum()]
