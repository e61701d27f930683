"""The operations on one checkpoint, a file each."""
