"""What is computed by running a model over text: expert statistics, expert selection, least-squares repairs, ablations.

Public: `calibrate.calibrate` and its options, `run_settings.RunSettings`, `collector.collect`, `layer_fit.fit_layers`,
`group_fit.fit_groups`, `ablation`. The pass itself is `forward`, the files are `stats`. Nothing here prints,
parses options, or depends on which operation it is called for: each declares its needs (`recipe.text_needs`).
"""
