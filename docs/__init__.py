"""Documentation and its generator."""
