"""Side-by-side timings of the shared mechanics, stored with the command that reproduces them."""
