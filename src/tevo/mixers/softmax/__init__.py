"""Softmax attention, its normalisers and its heads."""
