"""Reading checkpoints without loading them: headers, index, sources, element types."""
