"""GLUE: of its tasks the one from which others start."""
