"""Embeddings: tokens to vectors."""
