"""Is a checkpoint right, and not merely loadable? Checks as small functions that yield findings, and report formats."""
