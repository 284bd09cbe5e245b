"""sentencepiece alone, the peer of corpus preparation: texts in memory to ids in memory, by its own batch encoding.

A program for a process of its own: ``python -m benchmarks.raw_encoding MODEL TEXT REPORT --threads N``. Only the
encoding is timed; neither reading nor writing is, and ids go away as soon as they are counted.
"""

import argparse
import json
import time
from pathlib import Path

_BATCH_DOCUMENTS = 2048


def main() -> None:
    """Encodes every document of a .jsonl file and writes seconds, tokens and bytes as JSON."""
    import sentencepiece

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    with open(arguments.text, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(arguments.model))
    wall, cpu, num_tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = texts[start : start + _BATCH_DOCUMENTS]
        encoded = processor.encode(batch, num_threads=arguments.threads, return_type="numpy")
        num_tokens += sum(ids.size for ids in encoded)
    report = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": num_tokens,
        "documents": len(texts),
    }
    arguments.report.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
