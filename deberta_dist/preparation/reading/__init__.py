"""Reads files of all supported formats as documents."""
