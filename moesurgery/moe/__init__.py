"""The tensor algebra of one MoE block, in every layout.

Public: experts and their neurons (`neurons`, `layouts`, `expert_axis`), what fewer experts mean (`expert_counts`), a
factor on the routed output (`scaling`), matching and clustering, and names that do not depend on the layout
(`canonical_names`). Plans go in as values; no operation and no recipe belongs here.
"""
