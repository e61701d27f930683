"""Measuring: parameter counts and rooflines from headers, and loss by running the model."""
