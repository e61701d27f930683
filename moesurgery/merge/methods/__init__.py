"""The merge methods: annotated functions of arrays.

Public: nothing; `compute.method` finds them by name. No method reads files or knows tensor names.
"""
