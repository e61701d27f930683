"""The files that data-driven edits read, and what is computed from them: criteria, factors, similarity.

Public: `statistics_file`, `group_fit_file`, `repair_file`, `criteria`, `factors`, `similarity`. What makes these files
by running a model is in `fitting`.
"""
