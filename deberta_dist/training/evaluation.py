"""Held-out text: which rows, what loss, and what a predictor without context would reach."""

from pathlib import Path

from deberta_dist.data.bucketed_dataset import BucketedDataset
from deberta_dist.data.loader import Batch, MaskedLMDataset
from deberta_dist.data.sources import BlendedDataset
from deberta_dist.data.unigram import blended_counts, unigram_loss
from deberta_dist.files.atomic import replace_file
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.planning.plan import Plan
from deberta_dist.training.inputs import RunData
from deberta_dist.training.length import write_numbers
from deberta_dist.training.target_sizes import TargetSizes
from deberta_dist.training.trainer import EvaluationResult, Trainer

# Most tokens of the training text that the unigram model is fitted on.
UNIGRAM_TOKENS = 100_000_000


def evaluate(
    trainer: Trainer, *, plan: Plan, validation: MaskedLMDataset, mesh: Mesh, sizes: TargetSizes | None = None
) -> dict[str, EvaluationResult]:
    """Loss and accuracy of every network on ``evaluation.num_sequences`` held-out sequences, always the same.

    Targets are padded to ``sizes``.
    """
    size = plan.config.training.global_batch_size
    count = num_evaluation_sequences(plan, validation)
    rows = (rank_batch(validation, plan=plan, mesh=mesh, start=start, stop=count) for start in range(0, count, size))
    return trainer.evaluate_networks(trainer.pack(batch, sizes=sizes) for batch in rows)


def num_evaluation_sequences(plan: Plan, validation: MaskedLMDataset) -> int:
    """``evaluation.num_sequences``, or all sequences if there are fewer."""
    return min(plan.config.evaluation.num_sequences, validation.num_samples)


def rank_batch(
    data: MaskedLMDataset | BlendedDataset | BucketedDataset, *, plan: Plan, mesh: Mesh, start: int, stop: int | None = None
) -> Batch:
    """This data rank's rows of the global batch that starts at sample ``start``; rows from ``stop`` on have no targets."""
    rows = plan.config.training.global_batch_size // mesh.shape.data
    first = start + mesh.mesh_rank.data * rows
    batch = data.batch(first, rows)
    # All ranks take part in every batch: rows beyond the end are read, and have nothing to predict.
    if stop is not None and first + rows > stop:
        batch.labels[max(stop - first, 0) :] = 0
    return batch


def write_result(result: EvaluationResult, *, plan: Plan, data: RunData, directory: Path) -> str:
    """Writes ``result.json`` and ``result.txt`` and returns the text: the held-out loss beside its yardsticks."""
    count = num_evaluation_sequences(plan, data.validation)
    labels = data.validation.batch(0, count).labels
    vocab_size = data.tokenizer.num_tokens
    mixture = data.train.mixture
    unigram = unigram_loss(
        blended_counts(
            [source.corpus for source in mixture.sources],
            proportions=[float(share) for share in mixture.shares],
            vocab_size=vocab_size,
            max_tokens=UNIGRAM_TOKENS,
        ),
        labels[labels > 0].numpy(),
        vocab_size=vocab_size,
    )
    numbers = {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "num_targets": result.num_targets,
        "unigram_loss": unigram.loss,
        "unigram_entropy_of_targets": unigram.entropy,
        "beats_unigram": result.loss < unigram.entropy,
    }
    text = (
        f"held-out masked tokens   loss {result.loss:.4f}, accuracy {result.accuracy:.2%} ({result.num_targets:,} of them)\n"
        f"unigram of the training tokens on the same targets      loss {unigram.loss:.4f}\n"
        f"entropy of these targets (best without any context)     loss {unigram.entropy:.4f}\n"
        f"run directory            {directory}\n"
        "  metrics.jsonl          one JSON object per step\n"
        "  checkpoints/           an interrupted run resumes from the newest\n"
        "  weights/               config.json and model.safetensors, published names, float32\n"
        "  run_config.toml, deepspeed.json   everything this run was started with"
    )
    replace_file(directory / "result.txt", f"{text}\n".encode())
    write_numbers(directory, numbers, steps=plan.config.training.max_steps)
    return text
