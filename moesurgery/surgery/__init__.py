"""The operations on one checkpoint: pure functions from plan to plan, a file each, large ones a package.

Public: the operations, under the names that `recipe.registry` finds them by. They read headers and the files of
`stats`; what has to run over text first is in `fitting`, and nothing here writes.
"""
