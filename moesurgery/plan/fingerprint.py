"""A fingerprint of a plan's model, which depends on its contents and not on where it is stored."""

from __future__ import annotations

import hashlib
import json

from moesurgery.checkpoint.digest import sampled_digest
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
