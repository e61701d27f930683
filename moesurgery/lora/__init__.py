"""LoRA adapters: applied to a model, and extracted from two."""
