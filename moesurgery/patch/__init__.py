"""An edit as a patch: the recipe, what it reads, and the SHA-256 of every file before and after.

Public: `make_patch.make_patch`, `run_patch.open_patch`.
"""
