"""Which documents stay: quality, near-duplicates, texts of benchmarks."""
