"""Is a checkpoint right, and not merely loadable? Small functions that yield findings, and report formats.

Public: `run_checks.validate_checkpoint`, `codes.CODES`, `difference.diff_checkpoints`. A check is a function under
`@check` in a `check_*.py`; nothing here changes a checkpoint.
"""
