"""What is timed: each module exports ``CASES``, name -> function that makes a :class:`benchmarks.harness.Case`."""
