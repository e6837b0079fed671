"""Recurrences and state spaces."""
