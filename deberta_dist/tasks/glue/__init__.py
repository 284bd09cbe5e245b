"""GLUE: only the task from which others start."""
