"""Training: recipe, loop on accelerate, checkpoints that resume bit for bit."""
