"""Reading checkpoints without loading them: headers, index, sources, element types, file names.

Public: `checkpoint.open_checkpoint` and `Checkpoint`, `scan.scan_checkpoint`, `source.open_source`, `header`,
`filenames`, `dtypes`, `arrays` and `decode` (bytes of plain floats as numpy arrays and back). Nothing here depends
on what a tensor means, and nothing imports torch.
"""
