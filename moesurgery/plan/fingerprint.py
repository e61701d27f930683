"""What identifies a plan's model, whatever it is called: a digest of its contents, and one of its routers alone."""

from __future__ import annotations

import hashlib
import json

from moesurgery.checkpoint.digest import sampled_digest
from moesurgery.errors import RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.plan.dequantise import plain_values
from moesurgery.plan.plan import Plan


def fingerprint(plan: Plan) -> str:
    """Return a SHA-256 of the plan's config, of samples of its source shards (`checkpoint.digest`) and of its edits.

    A copy of a checkpoint has the fingerprint of the checkpoint. An edited plan's also depends on where its
    sources are.
    """
    digest = hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode())
    for checkpoint in plan.sources:
        for header in checkpoint.headers:
            sample = sampled_digest(checkpoint.source, header.file, header.file_size)
            digest.update(f"{header.file} {header.digest} {sample}\n".encode())
    untouched = set(plan.untouched())
    for name, expr in plan.tensors.items():
        digest.update(f"{name} {'' if name in untouched else repr(expr)}\n".encode())
    return digest.hexdigest()


def router_digest(plan: Plan) -> str | None:
    """Return a SHA-256 of all routers' rows, rounded to bfloat16; None where a router is no matrix that can be read.

    Quantised copies of a model keep its routers, in bfloat16 or float32, so that they have one digest with it. Reads
    the routers.
    """
    import ml_dtypes

    digest = hashlib.sha256()
    for block in plan.anatomy.main_blocks:
        if block.router is None:
            return None
        try:
            rows = values_of(plain_values(plan, block.router.name))
        except RefusedError:  # in a form that is not known
            return None
        digest.update(f"{block.where} {list(rows.shape)}\n".encode())
        digest.update(rows.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest() if plan.anatomy.main_blocks else None
