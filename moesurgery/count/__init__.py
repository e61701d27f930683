"""Exact parameter counts and the roofline, from headers alone."""
