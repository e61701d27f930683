"""How a merge method is run on tensors in flat memory."""
