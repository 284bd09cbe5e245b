"""Speed and memory beside a floor or a peer, in one run: what tools/benchmark.py calls, one module per subject."""
