"""Benchmarks: `python -m benchmarks --help`. One operation a file under `operations/`."""
