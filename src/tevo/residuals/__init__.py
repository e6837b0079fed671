"""Residual wirings: how the sublayers of a block are joined."""
