"""Low-rank attention."""
