"""From files of any kind to documents."""
