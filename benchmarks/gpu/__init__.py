"""What is to be seen on a GPU, in calls of a few minutes: `python -m benchmarks.gpu --help`."""
