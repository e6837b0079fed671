"""Whole-block systems."""
