"""Lazy tensor expressions: dtype and shape now, values when they are written. Knows nothing of model families."""
