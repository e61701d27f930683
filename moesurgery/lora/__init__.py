"""LoRA adapters in PEFT's format: applied to a model, and extracted from two.

Public: `apply.LoraAdapter`, `apply.adapted`, `extract.extract_lora`. Adapters of tied blocks are made by `surgery`.
"""
