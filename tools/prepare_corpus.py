#!/usr/bin/env python
"""``deberta-dist prepare-corpus`` from a checkout, which need not be installed."""

import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.cli.main import run
from deberta_dist.cli.prepare_corpus import main

if __name__ == "__main__":
    run(main)
