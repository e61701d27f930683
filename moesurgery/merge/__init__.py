"""Merging several checkpoints of one architecture, by mergekit's recipes.

Public: `merge_recipe.load_merge_recipe`. `recipe/` reads YAML, `methods/` are the formulas, `compute/` runs them on
tensors in flat memory; the files here plan: sources, placement, alignment, tokenizers.
"""
