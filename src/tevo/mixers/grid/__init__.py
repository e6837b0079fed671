"""Mixers of a grid of rows and columns."""
