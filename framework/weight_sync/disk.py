"""Weights to the engines through a directory that both sides see: no group, any network."""

import shutil
from collections.abc import Iterable

from framework.weight_sync.base import PushContext, Transport
from framework.weight_sync.engines import Engines
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket
from megatron_bridge.hf_writer import HfWriter

MAX_FILE_BYTES = 4 << 30


class DiskPush(Transport):
    """Rank 0 writes run_dir/weights/<version>; the engines read it; the one before is deleted."""

    def __init__(self, context: PushContext) -> None:
        self.context = context

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        context, size = self.context, 0
        directory = context.scratch_dir / f"version_{version}"
        shutil.rmtree(directory, ignore_errors=True)  # left by a trainer that was killed
        writer = HfWriter(directory, context.plan.entries, context.like, MAX_FILE_BYTES)
        for bucket in buckets:
            size += bucket.flat.nbytes
            if verifier is not None:
                verifier.add(bucket)
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                writer.add(name, tensor)
        writer.finish()
        engines.in_doubt = True
        engines.post(
            "/update_weights_from_disk",
            {
                "model_path": str(directory),
                "abort_all_requests": False,
                "weight_version": str(version),
                "flush_cache": context.flush_cache,
            },
        )
        for older in context.scratch_dir.iterdir():
            if older != directory:
                shutil.rmtree(older)
        return size

    def close(self, engines: Engines) -> None:
        """Delete what was written for the engines."""
        shutil.rmtree(self.context.scratch_dir, ignore_errors=True)
