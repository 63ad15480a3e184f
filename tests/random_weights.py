"""Weights for models that are made up: as large as trained ones, none of them 0 or 1."""

from typing import Any

import torch

from megatron_bridge.mapping import hf_shapes


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face config by its name, norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
    return tensors
