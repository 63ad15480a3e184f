"""Weights to engines on the same host through shared memory: no group, no copy on the way.

On a CPU a bucket lies in a shared file and the engines map it; on a GPU they open it by CUDA IPC.
HTTP carries only the handles, pickled as SGLang's endpoint wants them.
"""

import base64
import io
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from framework.weight_sync.base import PushContext, Transport
from framework.weight_sync.engines import Engines
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket


class TensorPush(Transport):
    """The trainers assemble each bucket on rank 0; every engine rank reads it where it lies."""

    def __init__(self, context: PushContext) -> None:
        self.context = context
        if not torch.cuda.is_available():
            # A foreign process cannot be handed file descriptors; with names it can.
            torch.multiprocessing.set_sharing_strategy("file_system")

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        context, size = self.context, 0
        engines.begin_session()
        for i, bucket in enumerate(buckets):
            last = i == len(context.plan.buckets) - 1
            rest = {
                "flush_cache": last and context.flush_cache,
                "abort_all_requests": False,
                "weight_version": str(version),
            }
            if bucket.flat.is_cuda:
                torch.cuda.synchronize()  # IPC knows nothing of our stream
            replies = engines.start(
                "/update_weights_from_tensor",
                [{"serialized_named_tensors": self._handles(bucket), **rest} for _ in engines.urls],
            )
            size += bucket.flat.nbytes
            if verifier is not None:
                verifier.add(bucket)
            engines.finish(replies)  # before the bucket's memory is used again
        engines.post("/end_weight_update", {})
        return size

    def close(self, engines: Engines) -> None:
        """Nothing is held."""

    def _handles(self, bucket: Bucket) -> list[str]:
        """One for each engine rank: a handle is counted, and each receiver counts it down once."""
        named = list(zip(bucket.names, bucket.tensors, strict=True))
        return [_pickled(named) for _ in range(self.context.engine_tp)]


def _pickled(named: list[tuple[str, torch.Tensor]]) -> str:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(named)
    return base64.b64encode(buffer.getvalue()).decode()
