"""``python -m deberta_dist VERB``: the same as ``deberta-dist VERB``."""

from deberta_dist.cli.main import run

if __name__ == "__main__":
    run()
