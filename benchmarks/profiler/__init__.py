"""Benchmarks of the head profiler."""
