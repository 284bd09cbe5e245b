"""GLUE: only MNLI, the intermediate task."""
