"""The tensor algebra of one MoE block, in every layout."""
