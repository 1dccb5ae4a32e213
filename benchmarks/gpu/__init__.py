"""Checks and timings on a GPU whose time is short: `python -m benchmarks.gpu --help`."""
