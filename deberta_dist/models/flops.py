"""FLOPs of the model, for stage balance, for model FLOPs utilisation and for the dry run.

A multiply-add counts 2. Recomputation is not counted: these are the model's FLOPs, not the hardware's. B sequences of S
tokens in a micro-batch, D hidden, F feed-forward, A all heads together, R rows
of the relative table, V vocabulary, W width of the embeddings, m share of masked tokens:

    layer       8 D A + 4 D F + 4 S A + 2 R A per position term + projections of the table / (B S)
    convolution 2 D D K
    EMD         keys and values once; twice for the masked share: query, output, feed-forward, scores
    head        m (2 D W + 2 W V)
"""

import re
from dataclasses import dataclass

from deberta_dist.models.config import DebertaConfig

# Dense bf16/fp16 tensor-core peaks of the SXM parts, FLOP/s, from the vendor's data sheets, by a word of the name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs per token.

    Attributes:
        units: One entry per encoder layer with what belongs to it (see ``pipeline_parallel/stages.py``); the
            last one is the enhanced mask decoder and the head.
    """

    units: tuple[float, ...]

    @property
    def forward(self) -> float:
        """FLOPs per token of the whole forward pass."""
        return sum(self.units)

    @property
    def training(self) -> float:
        """FLOPs per token of forward and backward pass; the backward pass has two products for each."""
        return 3.0 * self.forward


def forward_flops(
    config: DebertaConfig, *, max_seq_length: int, micro_batch_size: int, mask_probability: float
) -> ForwardFlops:
    """Counts the forward FLOPs of masked language modelling per token.

    Args:
        config: Sizes and switches of the encoder and the decoder.
        max_seq_length: S, tokens per sequence, all of them real.
        micro_batch_size: B, sequences: the table's projections are shared by the tokens of a micro-batch.
        mask_probability: m, the share of tokens that are predicted.
    """
    hidden, heads, rows = config.hidden_size, config.all_head_size, config.num_position_rows
    terms = len(config.pos_att_type)
    table = terms * 2 * rows * hidden * heads / (micro_batch_size * max_seq_length)
    attended = 4 * max_seq_length * heads
    positions = terms * 2 * rows * heads
    feed_forward = 4 * hidden * config.intermediate_size
    layer = 8 * hidden * heads + feed_forward + attended + positions + table
    units = [layer] * config.num_hidden_layers
    if config.conv_kernel_size > 0:
        units[0] += 2 * hidden * hidden * config.conv_kernel_size / config.conv_groups
    if config.uses_enhanced_mask_decoder:
        keys_once = 4 * hidden * heads + table + positions / terms * ("p2c" in config.pos_att_type)
        per_query = 4 * hidden * heads + feed_forward + attended + positions / terms * ("c2p" in config.pos_att_type)
        units[-1] = keys_once + 2 * mask_probability * per_query
    width = config.embedding_width
    if width != hidden:
        units[0] += 2 * width * hidden
    units[-1] += mask_probability * 2 * width * (hidden + config.vocab_size)
    return ForwardFlops(units=tuple(units))


def device_peak_flops(device_name: str) -> float | None:
    """Peak of one device, FLOP/s, or None where none is known (a CPU has no such number)."""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)
