"""mergekit's merge recipes, read strictly: every mistake with its line.

Public: `documents.read_stages`, `stage.Stage`. No model is opened here.
"""
