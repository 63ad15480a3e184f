"""What SGLang's /weights_checker must answer after a push, computed from the pushed tensors.

SGLang 0.5.23 (`srt/utils/weight_checker.py`, action=checksum) hashes every parameter of every
tensor-parallel rank, in the engine's own layout. Here each of those parameters is put together from
the exported buckets, hashed in the same way and forgotten; memory is bounded by the parameters that
are still incomplete (those of one layer, as exports go layer by layer).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bridge.export import Bucket
from megatron_bridge.mapping import engine_views, hf_shapes
from megatron_bridge.tensor_hash import cpu_checksum, gpu_checksum
from megatron_bridge.views import Box, View

CHECKSUMS = {"cpu": cpu_checksum, "cuda": gpu_checksum}
"""Device of the engine -> how it hashes."""


@dataclass(slots=True)
class _Target:
    """One engine parameter, shared by all ranks whose part of it is the same."""

    name: str
    view: View
    ranks: list[int]
    content: torch.Tensor | None = None
    """Allocated when the first box comes, dropped when the last one did."""
    missing: int = 0
    """Elements still to come."""
    checksum: str = ""


class ExpectedChecksums:
    """`add` every bucket of a push, then `compare` with each engine; `reset` before the next push.

    engine_tp: tensor-parallel ranks of an engine. dtype: what the engine holds its weights in.
    engine_device: cpu | cuda, decides how it hashes and pads; default: cuda where torch has it.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        engine_tp: int,
        dtype: torch.dtype,
        engine_device: str = "",
    ) -> None:
        engine_device = engine_device or ("cuda" if torch.cuda.is_available() else "cpu")
        if engine_device not in CHECKSUMS:
            raise ValueError(f"engine device is {engine_device!r}; it must be cpu or cuda")
        self._checksum = CHECKSUMS[engine_device]
        self._engine_tp = engine_tp
        self._dtype = dtype
        self._shapes = hf_shapes(hf_config)
        self._targets = _targets(hf_config, engine_tp, engine_device)
        self._wanted: dict[str, list[tuple[_Target, Box]]] = {name: [] for name in self._shapes}
        for target in self._targets:
            for box in target.view.boxes:
                self._wanted[box.name].append((target, box))
        self._added: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget what was added."""
        self._added.clear()
        for target in self._targets:
            target.content, target.checksum = None, ""
            target.missing = target.view.covered

    def add(self, bucket: Bucket) -> None:
        """Take in whole Hugging Face tensors; each tensor of the model once, in any order."""
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
            for target, box in self._wanted[name]:
                self._place(target, box, tensor)

    def compare(self, engine_reply: Mapping[str, Any]) -> list[str]:
        """What differs, a line each; empty when every parameter of every rank is as expected.

        engine_reply: the JSON that /weights_checker answered to {"action": "checksum"}.
        """
        absent = sorted(self._wanted.keys() - self._added)
        if absent:
            raise ValueError(f"{len(absent)} tensors were never added, among them {absent[0]}")
        if engine_reply.get("success") is not True:
            return [f"the engine gave no checksums: {engine_reply.get('message')!r}"]
        ranks = engine_reply.get("ranks")
        if not isinstance(ranks, list) or not ranks:
            return ["the engine's reply names no ranks"]
        differences: list[str] = []
        seen = set()
        for entry in ranks:
            tp_rank, problem = self._tp_rank(entry)
            if problem:
                differences.append(problem)
                continue
            seen.add(tp_rank)
            differences += self._compare_rank(tp_rank, entry["checksums"])
        silent = sorted(set(range(self._engine_tp)) - seen)
        return differences + [f"engine rank {rank} gave no checksums" for rank in silent]

    def _place(self, target: _Target, box: Box, tensor: torch.Tensor) -> None:
        """Copy one box; hash the parameter when it was the last one."""
        source = tensor[box.source]
        if target.view.shape == box.size:  # nothing to put together
            target.checksum = self._checksum(source.to(self._dtype))
            return
        if target.content is None:
            target.content = torch.zeros(target.view.shape, dtype=self._dtype, device=tensor.device)
        target.content[box.local].copy_(source)
        target.missing -= box.numel
        if target.missing == 0:
            target.checksum = self._checksum(target.content)
            target.content = None

    def _tp_rank(self, entry: Any) -> tuple[int, str]:
        """The rank that an entry of the reply speaks for, or what is wrong with the entry."""
        try:
            places = [p for p in entry["parallelism_info"] if p["role"] == "target"]
            place, checksums = places[0], entry["checksums"]
            tp_rank, tp, pp = place["tp_rank"], place["tp_size"], place["pp_size"]
        except (KeyError, TypeError, IndexError):
            return -1, "an entry of the engine's reply lacks parallelism_info or checksums"
        if (tp, pp) != (self._engine_tp, 1):
            return -1, f"the engine runs tp={tp} pp={pp}, expected tp={self._engine_tp} pp=1"
        if not isinstance(checksums, dict) or tp_rank not in range(tp):
            return -1, f"the engine's reply for rank {tp_rank!r} is malformed"
        return tp_rank, ""

    def _compare_rank(self, rank: int, found: Mapping[str, Any]) -> list[str]:
        expected = {t.name: t for t in self._targets if rank in t.ranks}
        differences = []
        for name, target in expected.items():
            if found.get(name) != target.checksum:
                what = "differs" if name in found else "is missing"
                sources = dict.fromkeys(box.name for box in target.view.boxes)
                differences.append(
                    f"engine rank {rank}: {name} {what} (made of {', '.join(sources)})"
                )
        extra = sorted(found.keys() - expected.keys())
        return differences + [f"engine rank {rank}: {name} is not expected" for name in extra]


def _targets(hf_config: Mapping[str, Any], engine_tp: int, device: str) -> list[_Target]:
    """Every engine parameter; ranks that hold the same part of it share one target."""
    targets: dict[tuple[str, View], _Target] = {}
    for rank in range(engine_tp):
        for name, view in engine_views(hf_config, engine_tp, rank, device).items():
            target = targets.setdefault((name, view), _Target(name, view, []))
            target.ranks.append(rank)
    return list(targets.values())
