"""Learned bridges against exact answers, floors and published numbers: ``python -m benchmarks continuous``."""
