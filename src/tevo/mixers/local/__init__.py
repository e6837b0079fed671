"""Local windows and block summaries."""
