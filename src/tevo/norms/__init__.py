"""Normalisations of features."""
