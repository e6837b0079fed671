"""Faster forms of the mechanics, each beside its plain reference."""
