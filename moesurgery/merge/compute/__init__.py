"""How a merge method is run on tensors in flat memory.

Public: `method.merge_method`, `merge_expr.MergeExpr`, `backend` (numpy, or torch on a device). No recipes here.
"""
