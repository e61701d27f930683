"""What is computed by running a model over text: statistics, choices, repairs, ablations.

Public: `collector.collect`, `layer_fit.fit_layers`, `group_fit.fit_groups`, `ablation`. The pass itself is `forward`,
the files are `stats`; nothing here prints or parses options.
"""
