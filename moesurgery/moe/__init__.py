"""The tensor algebra of one MoE block, in every layout.

Public: experts and their neurons (`neurons`, `layouts`, `expert_axis`), what depends on their number (`expert_counts`),
a factor on the routed output (`scaling`), matching and clustering, and names that do not depend on the layout
(`canonical_names`). Plans are passed as arguments; operations and recipes are elsewhere.
"""
