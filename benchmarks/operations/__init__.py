"""The benchmarked operations. Every module here defines a tuple OPERATIONS and is loaded automatically."""
