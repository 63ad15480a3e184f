"""Weights to the engines over a process group: one flat broadcast per bucket, gloo or NCCL."""

import socket

import torch
import torch.distributed as dist

from framework.weight_sync.base import PushContext
from framework.weight_sync.engines import Engines
from framework.weight_sync.groups import join_update_group
from megatron_bridge.export import export_buckets

GROUP = "drivetrain_weights"


class DistributedPush:
    """The trainers assemble each bucket on rank 0, which broadcasts it to all engine ranks."""

    def __init__(self, context: PushContext) -> None:
        self.context = context
        self._group = None
        self._backend = "nccl" if torch.cuda.is_available() else "gloo"

    def send(self, version: int, engines: Engines | None, verifier) -> int:
        """See `base.Transport`."""
        context, sent = self.context, 0
        buckets = export_buckets(context.plan, context.chunks, context.rank)
        if engines is None:
            for _ in buckets:  # takes part in the assembling; yields nothing here
                pass
            return 0
        if self._group is None:
            self._connect(engines)
        engines.post("/begin_weight_update", {})
        for bucket in buckets:
            last = bucket.index == len(context.plan.buckets) - 1
            futures = engines.start(
                "/update_weights_from_distributed",
                [
                    {
                        "names": list(bucket.names),
                        "dtypes": [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
                        "shapes": [list(shape) for shape in bucket.shapes],
                        "group_name": GROUP,
                        "load_format": "flattened_bucket",
                        "flush_cache": last and context.flush_cache,
                        "abort_all_requests": False,
                        "weight_version": str(version),
                    }
                ]
                * len(engines.urls),
            )
            dist.broadcast(bucket.flat, src=0, group=self._group)
            sent += bucket.flat.nbytes
            if verifier is not None:
                verifier.add(bucket)
            engines.finish(futures)
        engines.post("/end_weight_update", {})
        return sent

    def _connect(self, engines: Engines) -> None:
        tp = self.context.engine_tp
        world = 1 + tp * len(engines.urls)
        address, port = self.context.host, _free_port(self.context.host)
        futures = engines.start(
            "/init_weights_update_group",
            [
                {
                    "master_address": address,
                    "master_port": port,
                    "rank_offset": 1 + tp * k,
                    "world_size": world,
                    "group_name": GROUP,
                    "backend": self._backend,
                }
                for k in range(len(engines.urls))
            ],
        )
        self._group = join_update_group(
            address,
            port,
            rank=0,
            world_size=world,
            name=GROUP,
            backend=self._backend,
            timeout_s=engines.timeout_s,
        )
        engines.finish(futures)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
