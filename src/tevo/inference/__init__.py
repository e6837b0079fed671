"""Ways to use a trained model."""
