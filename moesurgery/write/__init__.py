"""Executing a plan: shards streamed to disk, published whole or not at all."""
