"""Rules that drop documents: quality, near-duplicates, benchmark contamination."""
