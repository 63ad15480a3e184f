"""Where trainer ranks meet, also after torchrun has started them again.

torchrun keeps one store for all its attempts (torch 2.13, `dynamic_rendezvous.py`: the bootstrap
store is cached), so the addresses of ranks that died are still in it, and new ranks would wait for
them. Ranks therefore agree on a part of the store that is this attempt's alone. Its number cannot
serve: torchrun counts attempts on each node by itself. To be deleted when torch prefixes the store.
"""

import datetime
import json
import secrets
import time

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.05


def open_store(timeout: datetime.timedelta) -> dist.Store:
    """A store in which nothing but this attempt's ranks has written.

    Raises:
        TimeoutError: not all ranks came within `timeout`.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    return agree(store, rank, world_size, timeout.total_seconds())


def agree(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Every rank says a word of its own; rank 0 repeats all words until all have heard theirs.

    Whoever died before said another word, so an old list never contains a new rank's.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
    store.set(f"word/{rank}", own)
    while True:
        if rank == 0:
            words = [store.get(f"word/{each}").decode() for each in range(world_size)]
            store.set("words", json.dumps(words))
        words = json.loads(store.get("words"))
        if words[rank] == own:
            store.set(f"heard/{rank}", words[0])
            heard = [f"heard/{each}" for each in range(world_size)]
            # Rank 0's word is of this attempt: who repeats it has heard a list of this attempt.
            if store.check(heard) and {store.get(key).decode() for key in heard} == {words[0]}:
                return dist.PrefixStore(f"ranks/{words[0]}", store)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"trainer rank {rank} met not all of the {world_size} ranks within "
                f"parallel.timeout_s={timeout_s:g}"
            )
        time.sleep(_POLL_S)
