"""Positions: where order enters."""
