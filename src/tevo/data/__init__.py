"""Readers of real data and generators that more than one program uses."""
