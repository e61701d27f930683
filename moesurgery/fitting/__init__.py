"""What is measured and fitted on text: statistics, fits of groups, repairs, ablations, and the way through them.

Public: `calibrate.calibrate` and its options, settings of a run, the functions that collect and fit. Nothing here
prints or parses a command line, or asks which operation it serves: each declares its needs in `recipe.text_needs`.
"""
