"""Whether the fused attention can run, and if not, why. Nothing else decides it. Needs no Triton."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil

import torch
from torch import Tensor

from deberta_dist.kernels.fused.tables import falls
from deberta_dist.kernels.fused.tiles import HEAD_SIZES
from deberta_dist.kernels.inputs import AttentionMask, RelativePositions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 6)
_MOST = 65535  # programs along the second and third dimension of a CUDA grid


def unavailable_reason(
    key_BNSH: Tensor,
    *,
    positions: RelativePositions,
    mask: AttentionMask | None,
    needs_probabilities: bool = False,
    has_position_scores: bool = False,
) -> str | None:
    """Why `fused_attention` cannot run here, or None if it can.

    Args:
        key_BNSH: the keys, whose dtype and device all inputs have to share.
        positions: rows of the relative table; a row may not fall as the distance grows.
        mask: of segments or None; pairs are not supported.
        needs_probabilities: the caller wants the attention probabilities, which are never in memory.
        has_position_scores: the caller has computed the products of keys and relative table.
    """
    if (reason := device_reason(key_BNSH.device)) is not None:
        return reason
    if needs_probabilities:
        return "the fused attention never holds the probabilities that are asked for"
    if has_position_scores:
        return "the fused attention computes the products of keys and relative table itself; give it rel_query_NRH"
    return unsupported_reason(key_BNSH, positions=positions, mask=mask) or triton_reason() or compiler_reason()


def device_reason(device: torch.device) -> str | None:
    """Why a device cannot run Triton kernels, whether or not Triton is installed; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the fused attention needs an NVIDIA GPU; the tensors are on {device}"
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return (
            f"the fused attention needs compute capability {'.'.join(map(str, _LEAST_CAPABILITY))} or more; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return None


def unsupported_reason(key_BNSH: Tensor, *, positions: RelativePositions, mask: AttentionMask | None) -> str | None:
    """Why the kernels do not support these inputs, whatever the device; None if they do."""
    batch, heads, _, head_size = key_BNSH.shape
    if key_BNSH.dtype not in DTYPES:
        return f"the fused attention takes {', '.join(map(str, DTYPES))}; given {key_BNSH.dtype}"
    if head_size not in HEAD_SIZES:
        return f"the fused attention takes heads of {', '.join(map(str, HEAD_SIZES))}; given {head_size}"
    if max(batch, heads) > _MOST:
        return f"{batch} sequences of {heads} heads; the fused attention takes at most {_MOST} of each"
    if mask is not None and mask.pairs_BQS is not None:
        return "the fused attention takes a mask of segments, not one of [queries, keys]"
    # Once per object: every layer asks, and the cache of `falls` would hash all rows each time.
    if positions.derived("falls", lambda: falls(positions.host_rows)):
        return "the fused attention sums neighbours that share a row; row_of_distance falls as the distance grows"
    return None


def triton_reason() -> str | None:
    """Why Triton cannot be used."""
    version = triton_version()
    if version is None:
        return "the fused attention needs Triton: pip install 'deberta_dist[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_TRITON:
        return f"the fused attention needs Triton {'.'.join(map(str, _LEAST_TRITON))} or newer; installed is {version}"
    return None


@functools.cache
def compiler_reason() -> str | None:
    """Why Triton could not start on a GPU, where it compiles a small module of its own in C; None if it can."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler on a GPU: install gcc or clang, or set CC"


@functools.cache
def triton_version() -> str | None:
    """Installed version, or None. Cached: every call asks. Vendors' builds have other distribution names."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return importlib.import_module("triton").__version__
