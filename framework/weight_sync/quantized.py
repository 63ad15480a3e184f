"""Weights in lower precision for the engines: as they hold them, or rounded in tensors of old type.

weight_sync.quantization

    fp8          linear weights of the layers go as block fp8 (`megatron_bridge.fp8`) and scales, as
                 DeepSeek-V3's and Qwen3's own fp8 checkpoints have them
    fp8_rounded, mxfp4_rounded, int2_rounded
                 they are rounded to block fp8, to MXFP4 (`megatron_bridge.mxfp4`) or to two bits
                 (`megatron_bridge.int2`), and back. The engine computes in its own type with values
                 that the format can hold: what rollouts of such an engine do to training can be
                 seen on any machine, but for the rounding of activations, which one may do too

All take whole tensors: a block that two trainer ranks share has one scale.
"""

from collections.abc import Callable, Iterator, Set
from typing import TypeVar

import torch

from framework.weight_sync.engines import WeightSyncError
from megatron_bridge.export import Bucket, ExportBuffers
from megatron_bridge.fp8 import SCALE_SUFFIX, dequantize, quantize
from megatron_bridge.int2 import round_int2
from megatron_bridge.mxfp4 import round_mxfp4

T = TypeVar("T")


def _round_fp8(weight: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(weight))


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp8_rounded": _round_fp8,
    "mxfp4_rounded": round_mxfp4,
    "int2_rounded": round_int2,
}
"""What is left of a weight [R, C]; ValueError where it is not finite."""


def rounded(buckets: Iterator[Bucket], names: Set[str], quantization: str) -> Iterator[Bucket]:
    """The same buckets, their tensors of these names rounded where they lie.

    quantization: a row of ROUNDED.

    Raises:
        WeightSyncError: such a tensor is not finite.
    """
    for bucket in buckets:
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
            if name in names:
                tensor.copy_(_checked(name, tensor, ROUNDED[quantization]))
        yield bucket


def in_fp8(buckets: Iterator[Bucket], names: Set[str], buffers: ExportBuffers) -> Iterator[Bucket]:
    """As many buckets, each tensor of these names in fp8 and its scales beside it.

    A bucket's widest types come first: SGLang takes no tensor that starts off its type's multiple.

    Raises:
        WeightSyncError: such a tensor is not finite.
    """
    for bucket in buckets:
        parts: list[tuple[str, torch.Tensor]] = []
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
            if name in names:
                values, scales = _checked(name, tensor, quantize)
                parts += [(name, values), (name + SCALE_SUFFIX, scales)]
            else:
                parts.append((name, tensor))
        parts.sort(key=lambda part: -part[1].element_size())
        size = sum(tensor.nbytes for _, tensor in parts)
        flat = buffers.take("fp8", size, bucket.flat.device)
        packed, offset = [], 0
        for _, tensor in parts:
            place = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            packed.append(place.copy_(tensor))
            offset += tensor.nbytes
        yield Bucket(
            names=[name for name, _ in parts],
            dtypes=[tensor.dtype for tensor in packed],
            shapes=[tuple(tensor.shape) for tensor in packed],
            flat=flat,
            tensors=packed,
        )


def _checked(name: str, tensor: torch.Tensor, work: Callable[[torch.Tensor], T]) -> T:
    try:
        return work(tensor)
    except ValueError as error:
        raise WeightSyncError(f"tensor {name}: {error}") from None
