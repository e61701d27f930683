"""What fits a machine, and what it is expected to cost: shapes of a model, their bytes and speed, curves of damage.

Public: `shape`, `costs`, `limits`, `candidates`, `budget`, `damage`. Pure functions of headers, config and statistics:
nothing here runs a model (`fitting`), edits a plan (`surgery`), reads weights or prints.
"""
