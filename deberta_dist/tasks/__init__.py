"""The SuperGLUE benchmark: its tasks, data files, predictions, scores and submissions. Nothing here needs torch."""
