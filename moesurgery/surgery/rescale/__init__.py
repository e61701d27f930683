"""The operation `rescale`: the number of active experts, and the factor that keeps the norm of what they add.

Public: `rescale.rescale`. `rules` chooses the factor, `data_free_factor` estimates it without data; where it goes is
`moe.scaling`.
"""
