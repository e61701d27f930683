"""Tied models, whose positions share blocks, in transformers.

Public: `registration.register_tied_models`. `modeling_tied.py` is also written beside every tied checkpoint, so it
imports nothing of this package.
"""
