"""``deberta-dist VERB``: one module a verb, each with its parser and a ``main`` that returns the exit code.

``tools/*.py`` are the same ``main`` functions under the names that they have in a checkout. A verb's ``--help`` and its
refusal of a wrong command line need neither torch nor DeepSpeed: whatever is heavy is imported after the arguments are read.
"""
