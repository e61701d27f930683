"""The merge methods, a file each."""
