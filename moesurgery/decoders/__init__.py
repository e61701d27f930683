"""What turns a dense decoder into a mixture of experts and back.

Public: `lookup.architecture` (what a `model_type` computes around its FFNs), `pairs` (which dense type becomes which
mixture exactly), `rewrites` (of weights), `dense_names` (for the way back). The operations themselves are in `surgery`.
"""
