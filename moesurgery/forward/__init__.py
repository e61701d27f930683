"""The streamed forward pass: transformers' own code of a model that does not fit in memory, layer by layer.

Public: `engine.Engine`, `hooks.Hooks` (what is seen and changed on the way), `text_windows`, `tokens`, `loss`. What is
computed from such a pass to edit a model is in `fitting`.
"""
