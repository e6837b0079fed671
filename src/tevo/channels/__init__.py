"""Channel mixers: each token is transformed."""
