"""A vocabulary for a corpus."""
