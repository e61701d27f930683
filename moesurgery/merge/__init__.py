"""Merging: methods that combine several checkpoints of one architecture, and mergekit's recipes that call them."""
