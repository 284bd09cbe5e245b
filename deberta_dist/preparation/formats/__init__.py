"""Token files: inspection, and conversion from and to other formats."""
