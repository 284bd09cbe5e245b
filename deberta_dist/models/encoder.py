"""The backbone: embeddings, layers, relative table, the model that runs them all, and what models with a head share.

Letters: B batch, S sequence, D hidden, R rows of the relative table.
"""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deberta_dist.errors import ConfigError
from deberta_dist.kernels import AttentionMask, RelativePositions
from deberta_dist.models import dropout as sites
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.convolution import ConvLayer
from deberta_dist.models.dropout import Dropout, child_key
from deberta_dist.models.fused_qkv import Linear, linear
from deberta_dist.models.initialisation import initialise_
from deberta_dist.models.layers import Layer
from deberta_dist.models.plain import is_plain
from deberta_dist.models.positions import relative_positions, visibility
from deberta_dist.models.published_state import accept_published_weights
from deberta_dist.models.shared_table import SharedTable, look_up
from deberta_dist.values import RECOMPUTE


def require_recompute_mode(mode: str) -> str:
    """Returns ``mode``.

    Raises:
        ConfigError: it is not one of `RECOMPUTE`.
    """
    if mode not in RECOMPUTE:
        raise ConfigError(f"recompute = {mode!r} is not one of {', '.join(RECOMPUTE)}")
    return mode


def call_with_recompute(
    function: Callable[..., Any], *args: Any, recompute: bool, dropout_key: int | None, owner: nn.Module
) -> Any:
    """``function(*args)``; with ``recompute`` only its arguments are saved for the backward pass.

    Args:
        function: depends on its arguments, parameters and dropout keys only.
        *args: tensors that ``function`` is called with.
        recompute: whether the backward pass calls ``function`` again.
        dropout_key: with a key, recomputed masks are the same; without one, torch's random state is saved and restored.
        owner: the module whose training mode decides; nothing is recomputed outside training.
    """
    if not (recompute and owner.training and torch.is_grad_enabled()):
        return function(*args)
    # torch's reentrant variant would need inputs that require gradients, and cannot be used with `torch.autograd.grad`.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout_key is None)


_ABOUT_FORMATS = re.compile(r"dtype|scalar type|data type|same type", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallInputs:
    """What one call gives to all parts of a model.

    Attributes:
        input_ids: int64 [B, S]; None where another stage has the embeddings.
        mask: which tokens each token sees.
        token_type_ids: int64 [B, S]; None: all 0.
        position_ids: absolute positions, int64 [B, S]; None: 0 .. S-1.
        dropout_key: see `DebertaModel.forward`.
        table: the word embeddings where others use them too.
    """

    input_ids: Tensor | None
    mask: AttentionMask
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    dropout_key: int | None = None
    table: SharedTable | None = None


class Embeddings(nn.Module):
    """dropout(m LayerNorm(proj(word + type + position))), m the token mask; what a generation lacks is left out.

    ``position_embeddings`` exists where positions are added here or in the enhanced mask decoder. With sequence parallelism
    ``word_embeddings`` returns this rank's tokens, and ``own_tokens`` selects the same tokens of everything else.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.position_biased_input = config.position_biased_input
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.padding_idx)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, width) if config.has_absolute_positions else None
        )
        if config.type_vocab_size > 0:
            self.token_type_embeddings: nn.Embedding | None = nn.Embedding(config.type_vocab_size, width)
        else:
            self.token_type_embeddings = None
        self.embed_proj = Linear(width, config.hidden_size, bias=False) if width != config.hidden_size else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob, site=sites.EMBEDDING_SITE)
        self.own_tokens = nn.Identity()

    def forward(self, inputs: CallInputs) -> Tensor:
        input_ids, position_ids = inputs.input_ids, inputs.position_ids
        assert input_ids is not None
        is_token_BS = inputs.mask.seen()
        x = look_up(input_ids, self.word_embeddings, inputs.table)
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(input_ids) if inputs.token_type_ids is None else inputs.token_type_ids
            x = x + self.token_type_embeddings(self.own_tokens(types))
        if self.position_biased_input:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            x = x + self.absolute_positions(self.own_tokens(position_ids))
        if self.embed_proj is not None:
            x = linear(x, self.embed_proj)
        x = self.LayerNorm(x)
        return self.dropout(x * self.own_tokens(is_token_BS).unsqueeze(-1).to(x.dtype), child_key(inputs.dropout_key, 0))

    def absolute_positions(self, positions: Tensor) -> Tensor:
        """Rows of the absolute position table for int64 positions of any shape."""
        assert self.position_embeddings is not None, "neither the input nor the decoder has positions"
        return self.position_embeddings(positions)


class Encoder(nn.Module):
    """Layers, the relative table they all share, and the convolution beside layer 0."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.num_layers = config.num_hidden_layers
        self.position_buckets = config.position_buckets
        self.max_relative_distance = config.max_relative_distance
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.num_rows = config.num_position_rows
        self.rel_embeddings = nn.Embedding(config.num_position_rows, config.hidden_size)
        normalises = config.norm_rel_ebd == "layer_norm"
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if normalises else None
        self.conv = ConvLayer(config) if config.conv_kernel_size > 0 else None
        self.recompute = "none"

    def relative_table(self, device: torch.device) -> Tensor:
        """The shared table [R, D], normalised where the generation does; once per forward."""
        table = self.rel_embeddings
        table_RD = table.weight if is_plain(table) else table(torch.arange(self.num_rows, device=device))
        return table_RD if self.LayerNorm is None else self.LayerNorm(table_RD)

    def relative_positions(self, device: torch.device) -> RelativePositions:
        """Rows of the relative table for queries and keys that are the same tokens."""
        return relative_positions(num_buckets=self.position_buckets, max_distance=self.max_relative_distance, device=device)

    def run_layers(
        self,
        hidden_BSD: Tensor,
        *,
        layers: range,
        rel_RD: Tensor,
        mask: AttentionMask,
        dropout_key: int | None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """Ordinary passes of ``layers`` in order, with the convolution after layer 0.

        Args:
            hidden_BSD: input of the first of them; the embeddings if that is layer 0.
            layers: consecutive numbers of layers that this model has.
            rel_RD: from `relative_table`, before dropout.
            mask: which token sees which.
            dropout_key: of the model's call; each layer derives its own. None for torch's random state.
            hidden_states: a list to append every layer's output to.
            attentions: a list to append every layer's attention probabilities to, [B, N, S, S] before dropout.
        """
        if not layers:
            return hidden_BSD
        positions = self.relative_positions(hidden_BSD.device)
        for number in layers:
            layer_key = child_key(dropout_key, number + 1)
            layer = self.layer[number]
            assert layer is not None, f"layer {number} was dropped by keep_layers"

            # Defaults bind this pass's values: with recomputation the function runs again after the loop has ended.
            def one_layer(
                x: Tensor, table: Tensor, layer: nn.Module = layer, key: int | None = layer_key
            ) -> tuple[Tensor, Tensor | None]:
                return layer(
                    x,
                    rel_RD=table,
                    positions=positions,
                    mask=mask,
                    dropout_key=key,
                    recompute_mode=self.recompute,
                    return_probabilities=attentions is not None,
                )

            output_BSD, probabilities = call_with_recompute(
                one_layer, hidden_BSD, rel_RD, recompute=self.recompute == "full", dropout_key=dropout_key, owner=self
            )
            if number == 0 and self.conv is not None:
                output_BSD = self.conv(hidden_BSD, output_BSD, mask=mask, dropout_key=layer_key)
            hidden_BSD = output_BSD
            if hidden_states is not None:
                hidden_states.append(hidden_BSD)
            if attentions is not None:
                attentions.append(probabilities)
        return hidden_BSD


class ExplainsNumberFormats(nn.Module):
    """A model that, when an operation fails over number formats, says which of its parameters have which.

    A model with several formats can be right: under autocast, with adapters that convert, with normalisations in float32. So
    nothing is refused beforehand, and nothing is checked unless an operation has failed.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``forward`` as nn.Module does.

        Raises:
            ValueError: parameters of several number formats meet in one operation.
        """
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            formats = number_formats(self)
            if len(formats) < 2 or not _ABOUT_FORMATS.search(str(error)):
                raise
            found = "; ".join(f"{name}: {_shown(modules)}" for name, modules in formats.items())
            message = (
                f"the model's parameters have several number formats ({found}) and one operation cannot take both: bring them to "
                "one, as model.to(torch.float32) does, or call the model under torch.autocast"
            )
        raise ValueError(message)


def number_formats(model: nn.Module) -> dict[str, list[str]]:
    """Floating point formats of a model's parameters -> names of the modules with such parameters; the most common first."""
    found: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            modules = found.setdefault(str(parameter.dtype).removeprefix("torch."), {})
            modules[name.rpartition(".")[0]] = None
    return {name: list(modules) for name, modules in sorted(found.items(), key=lambda item: -len(item[1]))}


def _shown(modules: list[str]) -> str:
    return ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaOutput:
    """What the backbone returns.

    Attributes:
        last_hidden_state: [B, S, D].
        hidden_states: the embeddings, then the output of every layer; None unless asked for.
        attentions: probabilities [B, N, S, S] of every layer, before dropout; None unless asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


torch.export.register_dataclass(DebertaOutput)


class DebertaModel(ExplainsNumberFormats):
    """The backbone of every generation: embeddings and encoder.

    Args:
        config: sizes and switches; which modules there are.
        seed: decides the initial parameters (see `initialisation`); None leaves that to the caller.
    """

    def __init__(self, config: DebertaConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        accept_published_weights(self, head_size=config.head_size, backbone="")
        if seed is not None:
            initialise_(self, seed=seed, std=config.initializer_range, prefix="deberta.")

    @property
    def recompute(self) -> str:
        """Which activations the backward pass recomputes: one of `values.RECOMPUTE`."""
        return self.encoder.recompute

    @recompute.setter
    def recompute(self, mode: str) -> None:
        self.encoder.recompute = require_recompute_mode(mode)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: int | None = None,
    ) -> DebertaOutput:
        """Hidden states of every token.

        Args:
            input_ids: int64 [B, S].
            attention_mask: 1 for real tokens, [B, S]; or [B, S, S] with row i saying which tokens token i sees. None: all
                tokens are real.
            token_type_ids: int64 [B, S]; None: all 0. Ignored by models without type embeddings.
            position_ids: absolute positions, int64 [B, S]; None: 0 .. S-1. Used with position_biased_input only.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: also return every layer's attention probabilities, which only the reference attention has.
            dropout_key: determines all dropout masks of the call. None: torch's random state does.
        """
        mask = visibility(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        inputs = CallInputs(
            input_ids=input_ids, mask=mask, token_type_ids=token_type_ids, position_ids=position_ids, dropout_key=dropout_key
        )
        embedded_BSD = self.embed(inputs)
        hidden_states = [embedded_BSD] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        last_BSD = self.encoder.run_layers(
            embedded_BSD,
            layers=range(self.encoder.num_layers),
            rel_RD=self.encoder.relative_table(embedded_BSD.device),
            mask=mask,
            dropout_key=dropout_key,
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return DebertaOutput(
            last_hidden_state=last_BSD,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    def embed(self, inputs: CallInputs) -> Tensor:
        """Input of layer 0, [B, S, D], zero where the mask has padding.

        Raises:
            ValueError: the sequence is longer than the absolute position table that is added.
        """
        assert inputs.input_ids is not None
        self.require_positions(inputs.input_ids.shape[1], added=self.config.position_biased_input)
        return self.embeddings(inputs)

    def run_stage(self, hidden_BSD: Tensor | None, inputs: CallInputs, *, layers: range) -> tuple[Tensor, Tensor]:
        """Ordinary passes of consecutive layers; layer 0 brings the embeddings with it.

        Args:
            hidden_BSD: output of the layer before; None, or ignored, if ``layers`` begins with 0.
            inputs: of the call.
            layers: empty: ``hidden_BSD`` is returned.

        Returns:
            Hidden states [B, S, D], and the relative table that the layers used, [R, D].
        """
        if layers.start == 0:
            hidden_BSD = self.embed(inputs)
        assert hidden_BSD is not None
        rel_RD = self.encoder.relative_table(hidden_BSD.device)
        hidden_BSD = self.encoder.run_layers(
            hidden_BSD, layers=layers, rel_RD=rel_RD, mask=inputs.mask, dropout_key=inputs.dropout_key
        )
        return hidden_BSD, rel_RD

    def require_positions(self, length: int, *, added: bool) -> None:
        """Refuses a sequence with fewer absolute positions than tokens, if they are ``added``: on a GPU the look-up aborts.

        Not while a program is exported: the comparison would restrict the lengths that the program accepts.
        """
        if torch.compiler.is_exporting():
            return
        if added and length > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens needs as many absolute positions; max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )

    def keep_layers(self, layers: Collection[int]) -> None:
        """Sets the modules to None that ``layers`` do not use; see `DebertaForMaskedLM.keep_layers`."""
        last = self.encoder.num_layers - 1
        for number in range(self.encoder.num_layers):
            if number not in layers:
                self.encoder.layer[number] = None  # type: ignore[assignment]  # torch takes None as well
        if 0 not in layers:
            self.embeddings.LayerNorm = None  # type: ignore[assignment]  # of the first stage alone
            self.embeddings.embed_proj = self.embeddings.token_type_embeddings = None
            self.encoder.conv = None
        if 0 not in layers and last not in layers:
            self.embeddings.word_embeddings = None  # type: ignore[assignment]  # of the first and the last stage
        if (0 if self.config.position_biased_input else last) not in layers:
            self.embeddings.position_embeddings = None


class ModelWithBackbone(ExplainsNumberFormats):
    """The part that models with a head share.

    Args:
        config: sizes and switches.

    Attributes:
        deberta: the backbone; its parameters have no start yet, which is the head's class to give to the whole.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        self.deberta = DebertaModel(config, seed=None)
        accept_published_weights(self, head_size=config.head_size)

    @property
    def recompute(self) -> str:
        """Which activations the backward pass recomputes: one of `values.RECOMPUTE`."""
        return self.deberta.recompute

    @recompute.setter
    def recompute(self, mode: str) -> None:
        self.deberta.recompute = mode
