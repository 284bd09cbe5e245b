"""Text to token files, and everything done with a corpus before a run reads it.

Reading text, preparation, inspection, and conversion from and to other formats. A run needs none of it: what it reads
is in ``data``.
"""
