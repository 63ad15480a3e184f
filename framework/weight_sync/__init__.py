"""Trainers to engines: pause, send, verify, continue.

push(version):  pause engines -> transport.send -> engine checksums == ours -> continue
"""

import contextlib
import time
from typing import Any

import torch

from framework.weight_sync.base import PushContext, PushReport, Transport
from framework.weight_sync.disk import DiskPush
from framework.weight_sync.distributed import DistributedPush
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.tensor import TensorPush
from framework.weight_sync.turns import Turns
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import export_buckets

TRANSPORTS: dict[str, type[Transport]] = {
    "distributed": DistributedPush,
    "disk": DiskPush,
    "tensor": TensorPush,
}


class WeightSync:
    """Keeps the engines at the trainers' weights. Every trainer rank holds one."""

    def __init__(
        self,
        transport: str,
        context: PushContext,
        engines: Engines | None,
        *,
        pause_mode: str,
        verify: bool,
        hf_config: dict[str, Any],
        engine_dtype: torch.dtype,
        engine_device: str,
        turns: Turns | None = None,
    ) -> None:
        """turns: where trainers and engines share devices."""
        self._context = context
        self._transport = TRANSPORTS[transport](context)
        self._engines = engines
        self._pause_mode = pause_mode
        self._turns = turns
        self._verifier: ExpectedChecksums | None = None
        if verify and engines is not None:
            self._verifier = ExpectedChecksums(
                hf_config, context.engine_tp, engine_dtype, engine_device
            )

    def push(self, version: int) -> PushReport:
        """Make every engine serve the trainers' weights as `version`; collective.

        Raises:
            WeightSyncError: an engine failed, or its own checksum of a tensor is not ours; the
                message names the tensors. The engines then stay paused.
        """
        verifier = self._verifier
        if verifier is not None:
            verifier.reset()
        start = time.perf_counter()
        with self._standing_still():
            size = self._send(version)
            sent = time.perf_counter()
            if verifier is not None:
                self._compare(version, verifier)
        end = time.perf_counter()
        return PushReport(size_bytes=size, time_s=end - start, verify_s=end - sent)

    def _send(self, version: int) -> int:
        context = self._context
        with export_buckets(
            context.plan, context.chunks, context.rank, buffers=context.buffers
        ) as buckets:
            if self._engines is not None:
                return self._transport.send(version, buckets, self._engines, self._verifier)
            next(buckets, None)  # takes part in the assembling
            return 0

    def trainers_turn(self) -> None:
        """Where devices are shared: the trainers have them, until the next push; collective."""
        if self._turns is not None:
            self._turns.trainers()

    def _standing_still(self) -> contextlib.AbstractContextManager[None]:
        if self._turns is not None:
            return self._turns.pushing()
        if self._engines is not None:
            return self._engines.paused(self._pause_mode)
        return contextlib.nullcontext()

    def close(self) -> None:
        """The run is over: leave the engines to themselves, at the version they have."""
        if self._engines is not None:
            self._transport.close(self._engines)
            self._engines.close()

    def _compare(self, version: int, verifier: ExpectedChecksums) -> None:
        assert self._engines is not None
        replies = self._engines.checksums()
        for url, reply in zip(self._engines.urls, replies, strict=True):
            wrong = verifier.compare(reply)
            if wrong:
                raise WeightSyncError(
                    f"{url} holds other weights than the trainers after the push of version "
                    f"{version}: {'; '.join(wrong)}"
                )
