"""Registers, spills and inner loops of the Triton kernels, compiled ahead of time, and the time that they imply.

`python -m tools.compile_report` prints two tables, and exits with 1 on a spill. No GPU is needed.
"""
