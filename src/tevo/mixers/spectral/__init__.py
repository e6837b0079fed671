"""Mixing in the Fourier domain."""
