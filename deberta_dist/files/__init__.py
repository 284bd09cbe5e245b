"""Files that survive what happens to machines: written whole or not at all, locked, read strictly."""
