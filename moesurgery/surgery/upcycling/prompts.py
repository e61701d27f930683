"""Router rows from prompts: what an expert should be chosen for, in the space that the router reads.

A row is the unit vector along the mean state of an expert's prompts, less that of its negative prompts. `hidden`
takes the state that the layer's router will see at each prompt's last token, after the post-attention norm,
`hidden_avg` the mean over its tokens; `cheap_embed` sums the prompts' embeddings and needs no forward pass.
(mergekit-moe has the same modes; its `hidden` takes the residual stream before attention and without the norm.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.plan.plan import Plan
from moesurgery.surgery.upcycling.dense import DenseModel

if TYPE_CHECKING:
    import torch

Mode = Literal["hidden", "hidden_avg", "cheap_embed"]
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Prompts:
    """What one group of experts should be chosen for, and what not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Prompts of several experts as one batch, padded on the right. `owner[i]` is (expert, positive) of row i."""

    ids: torch.Tensor
    mask: torch.Tensor
    owner: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Rows:
    """Float32 router rows [layers, experts, H], and the states [layer][tokens, H] on which they were found."""

    rows: torch.Tensor
    states: list[torch.Tensor]
    source: str  # what the states are, for people


def rows_from_prompts(dense: DenseModel, prompts: Sequence[Prompts], mode: Mode) -> Rows:
    """Return the router rows for each expert's prompts. Raises CheckpointError without a tokenizer."""
    tokens = tokenise(dense.plan, prompts)
    if mode == "cheap_embed":
        return _from_embeddings(dense, tokens, len(prompts))
    return _from_states(dense, tokens, len(prompts), average=mode == "hidden_avg")


def tokenise(plan: Plan, prompts: Sequence[Prompts]) -> Tokens:
    """Tokenise all prompts with the model's own tokenizer, each after its first token (BOS) where it has one."""
    import torch

    tokenizer = _tokenizer(plan)
    owner, found = [], []
    for expert, entry in enumerate(prompts):
        for positive, texts in ((True, entry.positive), (False, entry.negative)):
            for text in texts:
                ids = tokenizer.encode((tokenizer.bos_token or "") + text, add_special_tokens=False)
                if not ids:
                    raise RefusedError(f"upcycle: the prompt {text!r} has no tokens")
                owner.append((expert, positive))
                found.append(ids)
    longest = max(map(len, found))
    ids = torch.zeros(len(found), longest, dtype=torch.long)
    mask = torch.zeros(len(found), longest, dtype=torch.long)
    for i, row in enumerate(found):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Tokens(ids, mask, tuple(owner))


def _tokenizer(plan: Plan) -> Any:
    import transformers

    source = plan.checkpoint.source
    present = [file for file in _TOKENIZER_FILES if file in plan.checkpoint.file_sizes]
    if not present:
        raise CheckpointError(
            f"{source.identity} has no tokenizer, which prompts need", "copy tokenizer.json beside the model"
        )
    automatic: Any = transformers.AutoTokenizer
    with tempfile.TemporaryDirectory() as folder:
        for file in (*present, "config.json"):
            Path(folder, file).write_bytes(source.read(file, 0, plan.checkpoint.file_sizes[file]))
        try:
            return automatic.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"the tokenizer of {source.identity} cannot be loaded: {reason[0] if reason else error!r}"
            ) from None


def _from_embeddings(dense: DenseModel, tokens: Tokens, experts: int) -> Rows:
    import torch

    from moesurgery.measure.states import embeddings

    embedded = embeddings(dense.plan, tokens.ids)
    sums = []
    for expert in range(experts):
        row = torch.zeros(0)
        for positive in (True, False):
            chosen = [i for i, owner in enumerate(tokens.owner) if owner == (expert, positive)]
            if chosen:
                total = (embedded[chosen] * tokens.mask[chosen].unsqueeze(-1)).sum(dim=1).sum(dim=0)
                row = unit(total) if positive else row - unit(total)
        sums.append(unit(row))
    layers = len(dense.layers)
    flat = embedded[tokens.mask.bool()]
    flat = flat / flat.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
    return Rows(torch.stack(sums).expand(layers, -1, -1), [flat] * layers, "the prompts' embeddings, normalised")


def _from_states(dense: DenseModel, tokens: Tokens, experts: int, *, average: bool) -> Rows:
    import torch

    from moesurgery.measure.states import hidden_states

    assert dense.architecture.ffn is not None
    states = hidden_states(dense.plan, tokens.ids, tokens.mask, dense.architecture.ffn.root)
    lengths = tokens.mask.sum(dim=1)
    rows, flat = [], []
    for state in states:
        real = tokens.mask.bool()
        if average:
            of_prompt = (state * tokens.mask.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)
        else:
            of_prompt = state[torch.arange(len(state)), lengths - 1]
        found = []
        for expert in range(experts):
            row = torch.zeros(0)
            for positive in (True, False):
                chosen = [i for i, owner in enumerate(tokens.owner) if owner == (expert, positive)]
                if chosen:
                    row = of_prompt[chosen].mean(dim=0) if positive else row - of_prompt[chosen].mean(dim=0)
            found.append(unit(row))
        rows.append(torch.stack(found))
        flat.append(state[real])
    return Rows(torch.stack(rows), flat, "all tokens of the prompts")


def unit(row: torch.Tensor) -> torch.Tensor:
    """Return a vector at length 1 (or zeros as they are)."""
    length: torch.Tensor = row.norm(dim=-1, keepdim=True)
    return row / length.clamp(min=1e-8)


def loads(found: Rows, top_k: int) -> list[list[float]]:
    """Return, for each layer, the share of tokens that each group of experts would get; 1 / groups is balanced."""
    result = []
    for rows, states in zip(found.rows, found.states, strict=True):
        chosen = (states @ rows.T).topk(top_k, dim=-1).indices.flatten()
        counts = chosen.bincount(minlength=len(rows)).double()
        result.append((counts / counts.sum()).tolist())
    return result
