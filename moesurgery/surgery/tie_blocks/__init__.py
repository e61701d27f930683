"""The operation `tie-blocks`: several positions of the stack run with the weights of one block."""
