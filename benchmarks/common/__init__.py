"""What benchmarks share: the machine's description, its memory bandwidth, results on disk."""
