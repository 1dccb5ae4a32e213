"""One operation a file, each with a tuple OPERATIONS; all are found by themselves."""
