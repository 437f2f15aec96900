"""Time and memory of sbot and of other libraries to the same measured accuracy: ``python -m benchmarks speed``."""
