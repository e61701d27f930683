"""A checkpoint in the form that a client reads: the published layout, its config keys, the head written out.

What each client wants stands in `families.clients`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Full
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.clients import CLIENTS, Client, Wants, with_keys
from moesurgery.plan.plan import Plan
from moesurgery.surgery.upcycle.expert_tensors import EVEN_GATE

ClientName = Literal["transformers4", "transformers5", "vllm", "sglang", "llama.cpp", "mlx"]
_EMBEDDING = "embed_tokens.weight"
_SHARED_GATE = "mlp.shared_expert_gate.weight"
_DIVIDES_BY_GATE = ("qwen2_moe",)  # types whose shared expert's gate llama.cpp computes as silu(x) / x


def head_beside(tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the embedding and of the head that belongs to it; None where there is no such embedding."""
    names = [name for name in tensors if name.endswith(_EMBEDDING)]
    if len(names) != 1:
        return None
    before = names[0].removesuffix(_EMBEDDING)
    for inside in ("model.language_model.", "model."):
        if before.endswith(inside):
            return names[0], f"{before.removesuffix(inside)}lm_head.weight"
    return None


def lacks_head(wants: Wants, tensors: Mapping[str, Any]) -> bool:
    """Whether a client wants the head, and no tensor of that name is there."""
    names = head_beside(tensors)
    return wants.head and names is not None and names[1] not in tensors


def zero_gates(client: Client, config: Mapping[str, Any], tensors: Mapping[str, Expr]) -> list[str]:
    """Return the gates of shared experts that are all zero where the client would divide zero by zero. Reads them."""
    if client.name != "llama.cpp" or model_type_of(config) not in _DIVIDES_BY_GATE:
        return []
    gates = [n for n, e in tensors.items() if n.endswith(_SHARED_GATE) and e.dtype in PLAIN_FLOATS]
    return [name for name in gates if not values_of(tensors[name]).any()]


def asked_of_tokenizer(client: Client, checkpoint: Checkpoint, model_type: str) -> list[str]:
    """Return what the client's converter does not find in a tokenizer, and stops at; empty where there is none."""
    files = checkpoint.side_files
    if "tokenizer.json" not in files:
        return []
    file = client.tokenizer_files.get(model_type)
    if file is not None and file not in files:
        return [f"its converter asks for {file}"]
    wanted = client.tokens.get(model_type, ())
    try:
        size = checkpoint.source.files()["tokenizer.json"] if wanted else 0
        added = json.loads(checkpoint.source.read("tokenizer.json", 0, size)).get("added_tokens") if wanted else []
        have = {token["content"] for token in added or ()}
    except (ValueError, TypeError, KeyError, AttributeError, CheckpointError):
        return []  # `validate` says what is wrong with it
    missing = [token for token in wanted if token not in have]
    return [f"its converter asks the tokenizer for {', '.join(missing)}"] if missing else []


def obstacles(client: Client, plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Return why a client cannot run, in any form, the model of `config` with the plan's tokenizer."""
    return client.faults_of(config) or asked_of_tokenizer(client, plan.checkpoint, model_type_of(config))


def readable(plan: Plan, client: Client, operation: str) -> tuple[dict[str, Expr], dict[str, str], dict[str, Any], str]:
    """Return tensors, homes and config in the form that the client reads, layouts aside, and what was done.

    Raises RefusedError for what no form mends.
    """
    if wrong := obstacles(client, plan, plan.config):
        others = [name for name, other in CLIENTS.items() if not obstacles(other, plan, plan.config)]
        raise RefusedError(
            f"{operation}: {client.name} ({client.version}) does not run this model as it is: {'; '.join(wrong)}",
            f"it is for {', '.join(others)}" if others else "no client runs it",
        )
    wants = Wants(plan.config, (client,))
    tensors, shard_of, config = dict(plan.tensors), dict(plan.shard_of), plan.config
    done = []
    if wants.keys:
        config = with_keys(config, wants.keys)
        done.append(f"config keys {', '.join(wants.keys)}")
    if lacks_head(wants, tensors):
        embedding, head = head_beside(tensors) or ("", "")
        tensors[head], shard_of[head] = tensors[embedding], shard_of[embedding]
        config = _untied(config)
        done.append(f"{head} written, a copy of {embedding}")
    elif wants.head:
        config = _untied(config)
        done.append("the head, which is there, no longer tied")
    if gates := zero_gates(client, config, tensors):
        for name in gates:
            expr = tensors[name]
            tensors[name] = Full(EVEN_GATE[expr.dtype], expr.dtype, expr.shape)
        done.append(f"{len(gates)} gates of shared experts tiny instead of zero")
    return tensors, shard_of, dict(config), "; ".join(done)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = with_keys(config, {"tie_word_embeddings": False})
    return {**untied, "tie_word_embeddings": False} if "tie_word_embeddings" in config else untied
