"""Weights on disk: headers first, then only the bytes that a rank needs."""
