"""Makes a tokenizer for a corpus: samples its text, trains or copies a vocabulary, and measures how it fits."""
