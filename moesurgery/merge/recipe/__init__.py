"""mergekit's merge recipes, read strictly."""
