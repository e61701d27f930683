"""Operations as recipes name them: their registry, their parameters, and strict YAML.

Public: `registry` (`operation`, `apply`), `parameters.Param`, `reader.load_recipe`, `yaml_strict`, `mergekit_moe`. The
operations register themselves from `surgery`; merge recipes are in `merge`.
"""
