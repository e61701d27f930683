"""Exact parameter counts and the roofline of decoding, from headers alone.

Public: `params.count_params`, `roofline.roofline`, `roofline.ACCELERATORS`. No weight is read and no model is built.
"""
