"""What the tensors of a checkpoint mean: the family table, layout detection, routing, quantised forms."""
