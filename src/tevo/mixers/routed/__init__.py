"""Routed and clustered attention."""
