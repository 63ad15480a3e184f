"""Trainers and engines take turns on the same devices (rollout.engine.colocated).

    engines   generate ........ asleep ............ weights, then caches, generate
    trainers  away ............ train, push ....... away

A side frees its memory before the other one takes its own: at no time do a device's caches and its
optimizer state lie there together.
"""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from framework.megatron.offload import Offload
from framework.weight_sync.engines import Engines


class Turns:
    """Whose turn it is. Every trainer rank holds one; its calls are collective."""

    def __init__(self, engines: Engines | None, offload: Offload) -> None:
        """engines: on the pushing rank; asleep already."""
        self._engines = engines
        self._offload = offload

    def trainers(self) -> None:
        """The engines sleep, then the trainers' state comes back. Nothing if it is there."""
        if not self._offload.is_away:
            return
        if self._engines is not None:
            self._engines.sleep()
        dist.barrier()
        self._offload.back()

    @contextlib.contextmanager
    def pushing(self) -> Iterator[None]:
        """Within it the engines have memory for weights; after it they generate.

        When the body fails they stay asleep: no token may come from weights in doubt.
        """
        if self._engines is not None:
            self._engines.wake_weights()
        yield
        self._offload.away()
        dist.barrier()
        if self._engines is not None:
            self._engines.wake_caches()
