"""SuperGLUE: eight tasks and two diagnostics, the published scores, the submission."""
