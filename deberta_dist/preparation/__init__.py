"""Text to a corpus of token files, by one process or by many on many nodes.

``pipeline/prepare.py`` is the way in: ``reading`` turns files into documents, ``filtering`` drops some of them, ``pipeline``
divides the work and writes token files, which ``data`` reads. ``vocabulary`` makes tokenizers, ``formats`` converts corpora.
"""
