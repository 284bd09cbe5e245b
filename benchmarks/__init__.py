"""Speed and memory beside a floor or a peer, in one run: what tools/benchmark.py calls, one module per subject."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
