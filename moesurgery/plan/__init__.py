"""Lazy tensor expressions and the plan of an output checkpoint."""
