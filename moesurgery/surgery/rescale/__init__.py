"""The operation `rescale`: the number of active experts, and the factor that keeps the norm of what they add."""
