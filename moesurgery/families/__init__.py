"""What the tensors of a checkpoint mean: the family table, layout detection, routing, quantised forms, config keys.

Public: `recognition.recognise` and what it returns (`anatomy`), `family` (the words of the table), `config_keys`,
`layer_config`, `quantised`, `routing`. Data and its interpretation only: no expression is built here.
"""
