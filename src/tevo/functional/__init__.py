"""Mechanics that three or more systems share, as pure functions."""
