"""Benchmarks: `python -m benchmarks --help`. `operations/` has one file for each operation."""
