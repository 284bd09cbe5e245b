"""Crash-safe files: written completely or not at all, locked, read strictly."""
