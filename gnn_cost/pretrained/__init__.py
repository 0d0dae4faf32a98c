"""Weights that come with the package, each with its card beside it."""
