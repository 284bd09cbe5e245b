"""A run's inputs: corpora, tokenizer and initial weights, opened and checked before any process group exists."""

from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from deberta_dist.checkpoint.compatible import same_computation
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.checkpoint.manifest import MANIFEST_NAME
from deberta_dist.conversion import files
from deberta_dist.conversion.canonical import CanonicalCheckpoint, to_canonical
from deberta_dist.conversion.find_tokenizer import own_spm, unread_settings
from deberta_dist.conversion.official import GENERATOR_NAME, GENERATORS_HEAD, is_discriminator
from deberta_dist.conversion.options import CheckpointReadOptions
from deberta_dist.conversion.source import is_run, open_source
from deberta_dist.conversion.weights import shorten
from deberta_dist.data.bucketed_dataset import BucketedDataset
from deberta_dist.data.loader import MaskedLMDataset, check_vocabulary
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.sources import BlendedDataset
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError, DebertaDistError
from deberta_dist.models.initialisation import initial_tensor
from deberta_dist.planning.plan import Plan
from deberta_dist.planning.reading import UNNAMED, open_sources
from deberta_dist.training.target_sizes import TargetSizes, count_targets, num_sampled

# Order and masks of held-out text do not depend on the run's seed, so that losses of different runs are comparable.
EVALUATION_SEED = 20061


@dataclass(frozen=True)
class RunData:
    """The texts of a run, opened and checked against model and tokenizer.

    Attributes:
        tokenizer: ``data.tokenizer``; all corpora were encoded with it.
        train: Samples of ``data.train`` or ``data.sources``, packed or in buckets.
        validation: Held-out samples, in an order that is the same for every run: the first of them are a sample of all.
            Never in buckets, so that losses of runs with and without are of the same targets.
    """

    tokenizer: Tokenizer
    train: BlendedDataset | BucketedDataset
    validation: MaskedLMDataset

    def target_sizes(self, shapes: Sequence[tuple[int, int]]) -> tuple[TargetSizes, TargetSizes]:
        """Sizes to pad targets to, of the training text and of the held-out text, from a sample of each.

        Args:
            shapes: (sequences, tokens of each) of a micro-batch, for every bucket; the longest sequences last.
        """
        longest = shapes[-1]
        held_out = count_targets(self.validation.batch(0, num_sampled(longest[0])).labels)
        if isinstance(self.train, BlendedDataset):
            sampled = {longest: self.train.batch(0, num_sampled(longest[0]))}
        else:
            sampled = {shape: self.train.of_bucket(k, 0, num_sampled(shape[0])) for k, shape in enumerate(shapes)}
        counts = {shape: count_targets(batch.labels) for shape, batch in sampled.items() if batch is not None}
        return TargetSizes(counts), TargetSizes({longest: held_out})

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the texts, by their key in ``[data]``."""
        sources = self.train.mixture.sources
        texts = {f"sources.{source.name}" if source.name else UNNAMED: source.corpus.checksum for source in sources}
        return {**texts, "validation": self.validation.corpus.checksum}

    def position(self, consumed_samples: int) -> dict[str, dict[str, int]]:
        """Epoch, index in it and samples per epoch of each source after so many samples of the run."""
        positions = self.train.mixture.positions(consumed_samples)
        return {name or UNNAMED: asdict(place) for name, place in positions.items()}

    def resume_at(self, consumed_samples: int) -> int:
        """The number of samples at which a run continues that has consumed ``consumed_samples``.

        With buckets it is rounded up to a whole step, as a larger batch than before may end within one.
        """
        if isinstance(self.train, BlendedDataset):
            return consumed_samples
        return self.train.mixture.whole_steps(consumed_samples) * self.train.samples_per_step

    def epochs(self, consumed_samples: int) -> dict[str, float]:
        """Epochs of each source after so many samples of the run."""
        positions = self.train.mixture.positions(consumed_samples)
        return {name or UNNAMED: round(place.epochs, 6) for name, place in positions.items()}


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from.

    Attributes:
        read: Returns the full float32 tensor of a published name.
        notes: Lines for the log: what the weights are, and ``warning: ...`` for what the user should know.
    """

    read: Callable[[str], Tensor]
    notes: tuple[str, ...]


def open_data(plan: Plan) -> RunData:
    """Opens tokenizer and corpora and checks that they belong to each other and to the model.

    Raises:
        DataError: with the file and the key that names it.
    """
    data, seed = plan.config.data, plan.config.training.seed
    tokenizer = Tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, plan.model_config.vocab_size)
    masking = MaskingConfig(method=data.masking, mask_probability=data.mask_probability, max_ngram=data.max_ngram)
    options = {
        "max_seq_length": data.max_seq_length,
        "masking": masking,
        "document_boundaries": data.document_boundaries,
    }
    train = (
        BlendedDataset(open_sources(plan.config), tokenizer, seed=seed, **options)
        if data.bucket_lengths is None
        else BucketedDataset(
            open_sources(plan.config),
            tokenizer,
            lengths=data.bucket_lengths,
            samples_per_step=plan.config.training.global_batch_size,
            masking=masking,
            seed=seed,
            index_directory=data.index_directory,
        )
    )
    validation = MaskedLMDataset(open_corpus(data.validation), tokenizer, seed=EVALUATION_SEED, **options)
    _require_targets(validation, count=plan.config.evaluation.num_sequences)
    return RunData(tokenizer=tokenizer, train=train, validation=validation)


def _require_targets(validation: MaskedLMDataset, *, count: int) -> None:
    """Refuses held-out text whose first ``count`` sequences have nothing to predict: the run would end without a result."""
    count = min(count, validation.num_samples)
    for start in range(0, count, 64):
        if (validation.batch(start, min(64, count - start)).labels > 0).any():
            return
    raise DataError(
        f"data.validation = {validation.corpus.path}: {count:,} of its sequences are read (evaluation.num_sequences), and all "
        "their tokens are [UNK]: use text in the tokenizer's language, or another tokenizer"
    )


def open_initial_weights(plan: Plan, *, tokenizer_sha256: str | None, verify: bool) -> InitialWeights | None:
    """Opens ``training.init``; None if a run starts from random weights.

    Args:
        plan: The checked run, whose model the weights have to fit.
        tokenizer_sha256: SHA-256 of ``data.tokenizer``; None in a dry run before the file exists.
        verify: Compare every byte of a native checkpoint with its checksums; one rank of a run is enough.

    Raises:
        ConfigError: the weights belong to another model or tokenizer, or the path is a run directory, whose newest
            checkpoint may change.
        CheckpointError: there is no checkpoint, or tensors are unexplained, missing or of another shape.
    """
    path, config = plan.config.training.init, plan.model_config
    if path is None:
        return None
    where = f"{plan.config.source}: training.init = {path}"
    if is_run(path) and not files.has(path, MANIFEST_NAME):
        raise ConfigError(
            f"{where} is a run, whose newest checkpoint may change while ranks read it: name one of its checkpoints, "
            f"{path / CHECKPOINTS_NAME}/step-..., or its weights/"
        )
    training = plan.config.training
    options = CheckpointReadOptions(allow_unmapped=training.init_allow_unmapped, prefix=training.init_prefix)
    try:
        source = open_source(path, verify=verify, options=options)
        model = to_canonical(source)
    except DebertaDistError as error:
        raise type(error)(f"{where}: {_in_toml(str(error))}") from error
    sha256 = source.tokenizer_sha256
    if sha256 is None and not source.is_file and (own := own_spm(source)) is not None:
        sha256 = Tokenizer(own).sha256
    if tokenizer_sha256 is not None and sha256 not in (None, tokenizer_sha256):
        raise ConfigError(
            f"{where} was trained with a tokenizer of SHA-256 {sha256[:12]}..., data.tokenizer = "
            f"{plan.config.data.tokenizer} has {tokenizer_sha256[:12]}...: its embeddings are of other pieces"
        )
    is_told = not model.knows_decoder
    if is_told:
        model = to_canonical(source, decoder="emd" if config.uses_enhanced_mask_decoder else "plain")
    same_computation(model.config, config, where=where)
    shapes = plan.layout.full_shapes
    _require_all(model, shapes=shapes, where=f"{where} ({source.description})")
    notes = [f"starts from {path} ({source.description})", *_warnings(model, shapes=shapes)]
    notes += [f"warning: {text}" for text in unread_settings(source)]
    notes += [f"left out of it: {dropped.key} ({dropped.why})" for dropped in model.reading.dropped if "allow" in dropped.why]
    if is_told:
        notes.append(f"warning: it does not say how it was trained to decode: {model.decoder}, as model.decoder says")

    def read(name: str) -> Tensor:
        if name in model.weights:
            return model.weights[name].read().float()
        return initial_tensor(name, shapes[name], seed=plan.config.training.seed, std=config.initializer_range)

    return InitialWeights(read=read, notes=tuple(notes))


def _require_all(model: CanonicalCheckpoint, *, shapes: Collection[str], where: str) -> None:
    missing = [name for name in shapes if name not in model.weights and name not in model.lacking]
    if missing:
        cure = (
            f"the masked language model of a v3 release is its generator, {GENERATOR_NAME}"
            if is_discriminator(model.weights)
            else "pre-training continues from a masked language model, not from a backbone or a classifier"
        )
        raise CheckpointError(f"{where} lacks {shorten(missing)}: {cure}")


def _warnings(model: CanonicalCheckpoint, *, shapes: Container[str]) -> list[str]:
    """Warnings about weights that a masked language model does not use, or lacks."""
    found = [text for text in model.reading.warnings if text != GENERATORS_HEAD]
    if is_discriminator(model.weights):
        found.append(
            "training.init is a v3 discriminator: its encoder was trained to tell replaced tokens from real ones and never to "
            "predict words, and its masked language modelling head is the generator's, trained on another encoder: the loss "
            f"starts far above that of a trained model. A masked language model of the release is its generator, {GENERATOR_NAME}"
        )
    found += [
        f"training.init has no {name} (Hugging Face's classes do not save it): it starts at random, and the enhanced mask "
        "decoder adds it to every state that it decodes"
        for name in model.lacking
    ]
    if unused := [name for name in model.weights if name not in shapes]:
        found.append(f"training.init: {shorten(unused)}: masked language modelling does not use them")
    return [f"warning: {text}" for text in found]


def _in_toml(message: str) -> str:
    """A conversion's message with the TOML's keys in place of the command's flags."""
    return message.replace("--allow-unmapped", "training.init_allow_unmapped").replace("--prefix", "training.init_prefix")
