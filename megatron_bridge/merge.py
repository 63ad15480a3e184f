"""Weights with their adapters in them: W + alpha / r B A, merged when they are read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from megatron_bridge.load import ADAPTER, parameters, unwrap


class Merging(Protocol):
    """An adapter that can become part of its linear's weight."""

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's part of the weight with the adapter in it; a new tensor of its type."""
        ...


def add_adapter(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale B A, computed in fp32: a new tensor of the weight's type.

    weight [out, in], a [r, in], b [out, r]; scale: alpha / r (arXiv 2106.09685, section 4.1).
    """
    return (b.float() @ a.float()).mul_(scale).add_(weight).to(weight.dtype)


class MergedParameters(Mapping[tuple[int, str], torch.Tensor]):
    """`parameters` of a model with adapters, each weight merged at the moment it is asked for.

    The one asked for last is held, no other: an export goes through a weight box by box and merges
    it once. Made anew for every pass, for adapters change.
    """

    def __init__(self, chunks: Sequence[nn.Module], adapters: dict[tuple[int, str], Merging]):
        self._plain, self._adapters = parameters(chunks), adapters
        self._held: tuple[tuple[int, str], torch.Tensor] | None = None

    def __getitem__(self, key: tuple[int, str]) -> torch.Tensor:
        adapter = self._adapters.get(key)
        if adapter is None:
            return self._plain[key]
        if self._held is None or self._held[0] != key:
            self._held = None  # not two at a time
            self._held = key, adapter.merged(self._plain[key])
        return self._held[1]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def adapters_of(chunks: Sequence[nn.Module]) -> dict[tuple[int, str], nn.Module]:
    """(model chunk, name of the linear) -> its adapter."""
    return {
        (number, name.removesuffix(f".{ADAPTER}")): module
        for number, chunk in enumerate(chunks)
        for name, module in unwrap(chunk).named_modules()
        if name.endswith(f".{ADAPTER}")
    }


def whole_parameters(chunks: Sequence[nn.Module]) -> Mapping[tuple[int, str], torch.Tensor]:
    """`parameters` as others than trainers are to see them: with their adapters in them."""
    found = adapters_of(chunks)
    if not found:
        return parameters(chunks)
    weights: dict[tuple[int, str], Any] = {
        (chunk, f"{name}.weight"): each for (chunk, name), each in found.items()
    }
    return MergedParameters(chunks, weights)
