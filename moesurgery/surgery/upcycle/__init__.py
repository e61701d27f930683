"""The operation `upcycle`: one or several dense models into a mixture of experts.

Public: `upcycle.upcycle`. `design` has the algebra of exactness at step 0; what each type computes is in `decoders`.
"""
