"""What is computed by running a model over text: statistics, choices, repairs, ablations, and the way through them.

Public: `calibrate.calibrate` and its options, `run_settings.RunSettings`, `collector.collect`, `layer_fit.fit_layers`,
`group_fit.fit_groups`, `ablation`. The pass itself is `forward`, the files are `stats`. Nothing here prints, parses
options, or asks which operation it serves: each declares its needs (`recipe.text_needs`).
"""
