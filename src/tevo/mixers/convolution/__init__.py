"""Convolutions, long and short."""
