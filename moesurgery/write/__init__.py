"""Executing a plan: shards streamed to disk, published whole or not at all.

Public: `write_plan.write_plan`, `WriteOptions`, `card`, `recompute.Recomputer`. What is written is decided in the plan.
"""
