"""A process group between the pushing trainer rank and all engine ranks, beside the trainers' own.

torch offers no public call for a second, unrelated world; its private helper is what SGLang's own
side uses, and both sides must build the group alike.
"""

import datetime
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """Where the members meet, listening on a port that was free when it was bound: `store.port`."""
    # Not dist.rendezvous: under torchrun that would make rank 0 a client of the agent's own store.
    return dist.TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def join_update_group(
    store: dist.TCPStore,
    *,
    rank: int,
    world_size: int,
    name: str,
    backend: str,
    timeout_s: float,
) -> Any:
    """Form the group of all that come to `store`.

    Blocks until all members are there, at most timeout_s.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
