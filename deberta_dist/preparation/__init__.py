"""Text to a corpus of token files, by one process or by many on many nodes.

``prepare`` is the way in. What it reads is ``corpus``'s, what it writes is ``data``'s; here is the work between them.
"""
