"""The parameters of an SGLang engine, put together from the exported buckets one after another.

Each is given out when its last part came, and forgotten: memory is bounded by the parameters that
are still incomplete (those of one layer, as exports go layer by layer).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bridge.export import Bucket
from megatron_bridge.mapping import engine_float32_names, engine_views, hf_shapes
from megatron_bridge.models import describe
from megatron_bridge.models.mtp import without_mtp
from megatron_bridge.views import Box, View


@dataclass(slots=True, eq=False)
class EngineParameter:
    """One engine parameter, shared by all ranks whose part of it is the same."""

    name: str
    view: View
    ranks: list[int]
    content: torch.Tensor | None = None
    """Allocated when the first box comes, dropped when the last one did."""
    missing: int = 0
    """Elements still to come."""


class EngineParameters:
    """`add` every bucket of a push; `reset` before the next push.

    engine_tp: tensor-parallel ranks of an engine. dtype: what the engine holds its weights in.
    engine_device: cpu | cuda, decides how it pads.
    """

    def __init__(
        self, hf_config: Mapping[str, Any], engine_tp: int, dtype: torch.dtype, engine_device: str
    ) -> None:
        self.engine_tp = engine_tp
        self._dtype = dtype
        self._float32 = engine_float32_names(describe(hf_config))
        self._shapes = hf_shapes(without_mtp(hf_config))
        self.all = _shared(hf_config, engine_tp, engine_device)
        self._wanted: dict[str, list[tuple[EngineParameter, Box]]] = {n: [] for n in self._shapes}
        for each in self.all:
            for box in each.view.boxes:
                self._wanted[box.name].append((each, box))
        self._added: set[str] = set()
        self.reset()

    @property
    def absent(self) -> list[str]:
        """Hugging Face tensors that were not added since the last reset."""
        return sorted(self._wanted.keys() - self._added)

    def reset(self) -> None:
        """Forget what was added."""
        self._added.clear()
        for each in self.all:
            each.content = None
            each.missing = each.view.covered

    def add(self, bucket: Bucket) -> Iterator[tuple[EngineParameter, torch.Tensor]]:
        """Take in whole Hugging Face tensors, each tensor of the model once, in any order.

        Yields:
            What became complete: a parameter and its content, valid until the next one. With the
            first tensors also those that are padding and nothing else.

        Raises:
            ValueError: a tensor is not the model's, misshapen, or came twice.
        """
        if not self._added:
            yield from self._padding(bucket.flat.device)
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
            if name not in self._wanted:
                raise ValueError(f"pushed tensor {name} is not one of the engine's model")
            if name in self._added:
                raise ValueError(f"tensor {name} was pushed twice")
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(
                    f"pushed tensor {name} has shape {tuple(tensor.shape)}, the engine's model "
                    f"{self._shapes[name]}"
                )
            self._added.add(name)
            for each, box in self._wanted[name]:
                content = self._place(each, box, tensor)
                if content is not None:
                    yield each, content

    def _padding(self, device: torch.device) -> Iterator[tuple[EngineParameter, torch.Tensor]]:
        """On a CPU a narrow width may be padded to more than twice itself, then cut."""
        for each in self.all:
            if not each.view.boxes:
                yield each, torch.zeros(each.view.shape, dtype=self._type(each), device=device)

    def _type(self, each: EngineParameter) -> torch.dtype:
        return torch.float32 if each.name in self._float32 else self._dtype

    def _place(self, each: EngineParameter, box: Box, tensor: torch.Tensor) -> torch.Tensor | None:
        """Copy one box; the whole content when it was the last one."""
        source = tensor[box.source]
        dtype = self._type(each)
        if each.view.shape == box.size:  # nothing to put together
            return source.to(dtype)
        if each.content is None:
            each.content = torch.zeros(each.view.shape, dtype=dtype, device=tensor.device)
        each.content[box.local].copy_(source)
        each.missing -= box.numel
        if each.missing:
            return None
        content, each.content = each.content, None
        return content


def _shared(hf_config: Mapping[str, Any], engine_tp: int, device: str) -> list[EngineParameter]:
    """Every engine parameter; ranks that hold the same part of it share one."""
    found: dict[tuple[str, View], EngineParameter] = {}
    for rank in range(engine_tp):
        for name, view in engine_views(hf_config, engine_tp, rank, device).items():
            found.setdefault((name, view), EngineParameter(name, view, [])).ranks.append(rank)
    return list(found.values())
