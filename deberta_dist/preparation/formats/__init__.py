"""Token files: looked into, and to and from the formats of others."""
