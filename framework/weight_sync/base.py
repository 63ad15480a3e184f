"""What every transport of weights shares: the seam, the context, the report."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from framework.weight_sync.engines import Engines
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket, ExportBuffers
from megatron_bridge.export_plan import ExportPlan


@dataclass(kw_only=True)
class PushContext:
    """What a transport needs to know of the trainers and the engines."""

    plan: ExportPlan
    """The same on every rank."""
    chunks: list[Any]
    """This rank's bare models."""
    buffers: ExportBuffers
    """Memory that all pushes reuse."""
    rank: int
    engine_tp: int
    engine_device: str
    """cpu | cuda: where the engines hold their weights."""
    engine_dtype: torch.dtype
    """In what they hold them."""
    host: str
    """Interface of the pushing rank that the engines can reach."""
    scratch_dir: Path
    """Directory that trainers and engines both see."""
    like: Path
    """Hugging Face directory whose config and tokenizer go with written weights."""
    flush_cache: bool
    """Drop the engines' KV caches with the old weights (not under pause_mode=in_place)."""
    full_every_pushes: int = 0
    """A transport of changes sends all content so often; 0: only to whom a change does not help."""


class Transport(Protocol):
    """One way to move weights. A new one is one file and one row of TRANSPORTS."""

    sends_whole_tensors: bool = True
    """Whether `send` needs `buckets`; else they come only where checksums are compared."""

    prepares: bool = False
    """Whether `prepare` takes the buckets, and `send` gets none."""

    def __init__(self, context: PushContext) -> None: ...

    def prepare(
        self, version: int, buckets: Iterable[Bucket], verifier: ExpectedChecksums | None
    ) -> None:
        """What can be done before the engines stand still; as `send`, which follows it."""

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """Give every engine the trainers' weights as `version`; on the pushing rank (0) alone.

        Args:
            buckets: the whole model; the other ranks send while it is iterated.
            engines: paused.
            verifier: takes every bucket that is sent (`add`), or None.

        Returns:
            Bytes of weights sent to each engine.
        """
        ...

    def assist(self) -> None:
        """What a rank that is not the pushing one does while that one is in `send`, beside taking
        part in the assembling of buckets."""

    def close(self, engines: Engines) -> None:
        """Let go of what is held for the engines; the last call, on the pushing rank alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """One push, measured on the pushing rank."""

    size_bytes: int = 0
    time_s: float = 0.0
    verify_s: float = 0.0
