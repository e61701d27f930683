"""The streamed forward pass: a model that does not fit in memory, layer by layer."""
