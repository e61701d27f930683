"""The version of the package, on its own so that nothing has to import the whole package for it."""

__version__ = "0.1.0"
