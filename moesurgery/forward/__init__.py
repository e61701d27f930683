"""The layer-by-layer forward pass: transformers' own model code, for a model that does not fit in memory.

Public: `engine.Engine`, `hooks.Hooks` (callbacks that read and change activations), `text_windows`, `tokens`, `loss`.
What is computed from such a pass to edit a model is in `fitting`.
"""
