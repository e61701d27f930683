"""Lazy tensor expressions: dtype and shape now, values when they are written.

Public: `nodes` (the base, and selections that compile to byte ranges), `elementwise`, `tensors`, `random`, `shared`,
`evaluate`. Nothing here depends on model families or plans; torch is imported to compute values only.
"""
