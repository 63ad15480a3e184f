"""Block fp8: a model's linear weights in float8_e4m3fn, a scale for every 128 x 128 block.

As DeepSeek-V3's and Qwen3's own fp8 checkpoints have it (arXiv 2412.19437, sec. 3.3.2): `weight` is
the weight over its block's scale, `weight_scale_inv` the scales to multiply it by, float32,
[ceil(rows / 128), ceil(columns / 128)]. Blocks are counted from the start of the whole Hugging Face
tensor, so a trainer's cut never shows; one at an edge may be smaller.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from megatron_bridge.hf_writer import Entry
from megatron_bridge.mapping import layer_name, template_shapes
from megatron_bridge.models.architecture import ModelDescription, Section
from megatron_bridge.models.mtp import PROJECTION

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SCALE_SUFFIX = "_scale_inv"
STRIP_BLOCKS = 32
"""Rows of blocks that are in float32 at a time."""
_GATE = re.compile(r"gate\.weight$")
"""Routers, and the gate of a shared expert: small, and they decide; they keep their type."""


class Tensors(Protocol):
    """Named tensors, told beforehand and read one at a time."""

    def entries(self) -> Iterator[Entry]: ...

    def read(self, name: str) -> torch.Tensor: ...


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [R, C] of any float type -> fp8 [R, C], float32 [ceil(R / 128), ceil(C / 128)].

    A block's largest magnitude becomes 448, the largest that fp8 holds; each element is off by at
    most 1/16 of itself or 2^-10 of its block's scale, whichever is more.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), device=weight.device)
    for first in range(0, rows, BLOCK * STRIP_BLOCKS):
        strip = weight[first : first + BLOCK * STRIP_BLOCKS].float()
        height = strip.shape[0]
        padding = (0, -columns % BLOCK, 0, -height % BLOCK)
        blocks = torch.nn.functional.pad(strip, padding).view(-1, BLOCK, scales.shape[1], BLOCK)
        largest = blocks.abs().amax((1, 3))
        if not largest.isfinite().all():
            raise ValueError("it holds values that are not finite, which fp8 cannot")
        scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        scale[largest == 0] = 1.0
        blocks = (blocks / scale[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
        scales[first // BLOCK :][: len(scale)] = scale
        values[first : first + height] = blocks.view(-1, padding[1] + columns)[:height, :columns]
    return values, scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The counterpart of `quantize`: float32 [R, C]."""
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return values.float() * whole[: values.shape[0], : values.shape[1]]


def linear_names(model: ModelDescription) -> set[str]:
    """Weights that are quantised: the linear ones of all layers, gates aside, and aside what a
    multi-token prediction layer has besides them."""
    names: set[str] = set()
    for layer in model.shape.all_layers:
        shapes = template_shapes(model, model.shape.layer_sections(layer) - {Section.MTP})
        names |= {
            layer_name(name, layer)
            for name, shape in shapes.items()
            if len(shape) == 2 and not _GATE.search(name)
        }
    return names


def fp8_config(hf_config: Mapping[str, Any], model: ModelDescription) -> dict[str, Any]:
    """`hf_config` with what transformers and SGLang must know of the quantisation."""
    kept = ["lm_head"]
    for layer in model.shape.all_layers:
        shapes = template_shapes(model, model.shape.layer_sections(layer))
        gates = (layer_name(name, layer) for name in shapes if _GATE.search(name))
        kept += [name.removesuffix(".weight") for name in gates]
    kept += [layer_name(PROJECTION, n).removesuffix(".weight") for n in model.shape.mtp_numbers]
    return {
        **hf_config,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        },
    }


class Fp8Tensors:
    """The tensors of a model, its linear weights in fp8, each followed by its scales."""

    def __init__(self, tensors: Tensors, model: ModelDescription) -> None:
        self._tensors = tensors
        self._linear = linear_names(model)
        self._scales: tuple[str, torch.Tensor] | None = None

    def entries(self) -> Iterator[Entry]:
        """Name, type and shape of every tensor, in the order of the model."""
        for name, dtype, shape in self._tensors.entries():
            if name not in self._linear:
                yield name, dtype, shape
                continue
            yield name, FP8, shape
            blocks = tuple(-(-size // BLOCK) for size in shape)
            yield name + SCALE_SUFFIX, torch.float32, blocks

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor. Scales are kept of the weight before them, else computed again.

        Raises:
            ValueError: a weight is not finite; the message names it.
        """
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in self._linear:
            return self._tensors.read(name)
        if name != weight and self._scales is not None and self._scales[0] == weight:
            return self._scales[1]
        try:
            values, scales = quantize(self._tensors.read(weight))
        except ValueError as error:
            raise ValueError(f"--fp8: tensor {weight}: {error}") from None
        self._scales = (weight, scales)
        return values if name == weight else scales
