"""Weights to the engines over a process group: one flat broadcast per bucket, gloo or NCCL."""

import contextlib
import secrets
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from framework.weight_sync.base import PushContext, Transport
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.groups import join_update_group, open_store
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket
from rollout.server.server_process import public_host


class DistributedPush(Transport):
    """The trainers assemble each bucket on rank 0, which broadcasts it to all engine ranks."""

    def __init__(self, context: PushContext) -> None:
        self.context = context
        self._group: Any = None
        self._joined: Engines | None = None
        """The engines in the group."""
        self._name = ""
        self._backend = "nccl" if torch.cuda.is_available() else "gloo"

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        context, size = self.context, 0
        if self._joined is None or self._joined.urls != engines.urls:
            self._leave()
            self._connect(engines)
        engines.begin_session()
        for i, bucket in enumerate(buckets):
            last = i == len(context.plan.buckets) - 1
            body = {
                "names": list(bucket.names),
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
                "shapes": [list(shape) for shape in bucket.shapes],
                "group_name": self._name,
                "load_format": "flattened_bucket",
                "flush_cache": last and context.flush_cache,
                "abort_all_requests": False,
                "weight_version": str(version),
            }
            path = "/update_weights_from_distributed"
            replies = engines.start(path, [body] * len(engines.urls))
            self._broadcast(bucket)
            size += bucket.flat.nbytes
            if verifier is not None:
                verifier.add(bucket)
            engines.finish(replies)
        engines.post("/end_weight_update", {})
        return size

    def close(self, engines: Engines) -> None:
        """Leave the group, on both sides."""
        self._leave()

    def _broadcast(self, bucket: Bucket) -> None:
        try:
            dist.broadcast(bucket.flat, src=0, group=self._group)
        except RuntimeError as error:  # what torch raises when a member is gone or waits too long
            self._leave()
            raise WeightSyncError(f"the group of trainer and engines broke: {error}") from error

    def _leave(self) -> None:
        """Give up the group, ours first: whoever still waits for a bucket then hears of it."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._joined is not None:
            body = {"group_name": self._name}
            for future in self._joined.start(
                "/destroy_weights_update_group", [body] * len(self._joined.urls)
            ):
                with contextlib.suppress(WeightSyncError):  # it may be the one that is gone
                    future.result(timeout=self._joined.timeout_s)
            self._joined.close()
            self._joined = None

    def _connect(self, engines: Engines) -> None:
        # An engine outlives trainers that restart, and forgets no group name.
        self._name = f"drivetrain_{secrets.token_hex(4)}"
        self._joined = engines.only(engines.urls)
        tp = self.context.engine_tp
        world = 1 + tp * len(engines.urls)
        address = public_host(self.context.host)
        store = open_store(address, engines.timeout_s)
        futures = engines.start(
            "/init_weights_update_group",
            [
                {
                    "master_address": address,
                    "master_port": store.port,
                    "rank_offset": 1 + tp * k,
                    "world_size": world,
                    "group_name": self._name,
                    "backend": self._backend,
                }
                for k in range(len(engines.urls))
            ],
        )
        self._group = join_update_group(
            store,
            rank=0,
            world_size=world,
            name=self._name,
            backend=self._backend,
            timeout_s=engines.timeout_s,
        )
        engines.finish(futures)
