"""Hosts that take any part, and whole published models."""
