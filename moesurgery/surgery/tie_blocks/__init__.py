"""The operation `tie-blocks`: several positions of the stack run with the weights of one block.

Public: `tie_blocks.tie_blocks`. The classes that load such a model are in `tied`.
"""
