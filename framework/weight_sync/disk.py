"""Weights to the engines through a directory that both sides see: no group, any network."""

import shutil

from framework.weight_sync.base import PushContext
from framework.weight_sync.engines import Engines
from megatron_bridge.export import export_buckets
from megatron_bridge.save import save_buckets


class DiskPush:
    """Rank 0 writes run_dir/weights/<version>; the engines read it; the one before is deleted."""

    def __init__(self, context: PushContext) -> None:
        self.context = context

    def send(self, version: int, engines: Engines | None, verifier) -> int:
        """See `base.Transport`."""
        context, sent = self.context, 0
        buckets = export_buckets(context.plan, context.chunks, context.rank)
        if engines is None:
            for _ in buckets:  # takes part in the assembling; yields nothing here
                pass
            return 0

        def counted():
            nonlocal sent
            for bucket in buckets:
                sent += bucket.flat.nbytes
                if verifier is not None:
                    verifier.add(bucket)
                yield bucket

        directory = context.scratch_dir / f"version_{version}"
        save_buckets(counted(), directory, like=context.like)
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
        return sent
