"""Measurements, one command each: `python -m benchmarks.<name>`. No test depends on a time."""
