"""The n-gram convolution beside layer 0, under its published parameter names.

Letters: B batch, D hidden, S sequence.

Source: microsoft/DeBERTa DeBERTa/deberta/bert.py@4d7fe0bd.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.kernels import AttentionMask
from deberta_dist.models import dropout as sites
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.layers import ACTIVATIONS
from deberta_dist.models.plain import is_plain


class ConvLayer(nn.Module):
    """Local n-gram convolution of the embeddings, added after layer 0 (nGiE of v2).

    y = LayerNorm(x_1 + act(dropout(m conv(x_0)))) m, x_0 the embeddings, x_1 the output of layer 0, m the token mask.
    A neighbour that a token does not see counts as zero, like one beyond the ends of the sequence.

    Sequence parallelism replaces ``halo`` by a module that adds (taps - 1) / 2 tokens from each neighbouring rank, zeros at
    the ends, and ``own_tokens`` by one that takes this rank's tokens of a whole sequence.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        taps = config.conv_kernel_size
        self.taps = taps
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, taps, padding=(taps - 1) // 2, groups=config.conv_groups)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob, site=sites.CONVOLUTION_SITE)
        self.activation = ACTIVATIONS[config.conv_act]
        self.halo = nn.Identity()
        self.own_tokens = nn.Identity()

    def forward(
        self,
        embeddings_BSD: Tensor,
        layer_BSD: Tensor,
        *,
        mask: AttentionMask,
        dropout_key: int | None,
    ) -> Tensor:
        """Output of layer 0 with the convolution added.

        Args:
            embeddings_BSD: x_0, the input of layer 0; zero where there is padding.
            layer_BSD: x_1, the output of layer 0.
            mask: m, and which token sees which, for the whole sequence even if this rank has a shard of it.
            dropout_key: that of layer 0; the dropout's site distinguishes it. None for torch's random state.
        """
        is_token_BS, length = self.own_tokens(mask.seen()), embeddings_BSD.shape[1]
        x_BDS = self.halo(embeddings_BSD).transpose(1, 2)
        if mask.is_of_padding:  # padding is zero already, so an ordinary convolution is right
            local = self.conv(x_BDS).narrow(-1, (x_BDS.shape[-1] - length) // 2, length)
        else:
            local = self._conv_of_seen(x_BDS, mask, length=length)
        local = local.transpose(1, 2).masked_fill(~is_token_BS.unsqueeze(-1), 0.0)
        local = self.activation(self.dropout(local, dropout_key))
        return self.LayerNorm(layer_BSD + local) * is_token_BS.unsqueeze(-1).to(layer_BSD.dtype)

    def _conv_of_seen(self, x_BDS: Tensor, mask: AttentionMask, *, length: int) -> Tensor:
        """bias + sum over taps o of W_o x[s + o] where s sees s + o.

        Masked after each product, not before, so that ``x_BDS`` is saved once and not as a masked copy per tap.
        """
        if not is_plain(self.conv) or self.conv.bias is None:
            return self._conv_of_windows(x_BDS, mask, length=length)
        taps, first = self.taps, (x_BDS.shape[-1] - length) // 2
        local = self.conv.bias[:, None]
        for tap in range(taps):
            offset = tap - (taps - 1) // 2
            # An exported program's length is symbolic and cannot be compared; it needs at least as many tokens as taps.
            if not torch.compiler.is_exporting() and abs(offset) >= mask.seen().shape[-1]:
                continue
            product = F.conv1d(x_BDS, self.conv.weight[:, :, tap : tap + 1], groups=self.conv.groups)
            if offset:
                product = product.roll(-offset, dims=-1)
            product = product.narrow(-1, first, length)
            if offset:
                product = product.masked_fill(~self._sees(mask, offset)[:, None], 0.0)
            local = local + product
        return local

    def _conv_of_windows(self, x_BDS: Tensor, mask: AttentionMask, *, length: int) -> Tensor:
        """The same by calling ``conv``, which may be adapted: each token with its neighbours is a sequence, unseen ones zero."""
        half = (self.taps - 1) // 2
        beyond = half - (x_BDS.shape[-1] - length) // 2
        windows_BDST = F.pad(x_BDS, (beyond, beyond)).unfold(-1, self.taps, 1)
        is_token_BS = self.own_tokens(mask.seen())
        sees = [
            is_token_BS
            if offset == 0
            else self._sees(mask, offset)
            if abs(offset) < mask.seen().shape[-1]
            else torch.zeros_like(is_token_BS)
            for offset in range(-half, half + 1)
        ]
        windows_BSDT = windows_BDST.masked_fill(~torch.stack(sees, dim=-1)[:, None], 0.0).transpose(1, 2)
        middle = self.conv(windows_BSDT.flatten(0, 1))[..., half]
        return middle.view(*windows_BSDT.shape[:3]).transpose(1, 2)

    def _sees(self, mask: AttentionMask, offset: int) -> Tensor:
        """Whether each of this rank's tokens sees the one ``offset`` after it; False beyond the ends of the sequence."""
        return self.own_tokens(F.pad(mask.seen_at(offset), (max(-offset, 0), max(offset, 0))))
