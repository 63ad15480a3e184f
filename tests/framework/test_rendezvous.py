"""Ranks that meet in a store in which earlier attempts, cut short anywhere, left their words."""

import contextlib
import datetime
import threading

import pytest
import torch.distributed as dist

from framework.megatron.rendezvous import agree


def meet(
    store: dist.Store, ranks: list[int], world_size: int, timeout_s: float
) -> list[dist.Store]:
    """What each rank gets, when they come at the same time."""
    found: dict[int, dist.Store] = {}

    def join(rank: int) -> None:
        with contextlib.suppress(TimeoutError, dist.DistStoreError):
            found[rank] = agree(store.clone(), rank, world_size, timeout_s)  # pyright: ignore

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("before", [[], [[0, 1, 2]], [[0, 1]], [[1, 2]], [[0, 2], [0, 1, 2], [1]]])
def test_ranks_meet_whatever_earlier_attempts_left(before):
    timeout = datetime.timedelta(seconds=5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout)
    for ranks in before:
        for each in meet(store, ranks, 3, timeout_s=0.5):
            each.set("address", "of a rank that is dead")
    stores = meet(store, [0, 1, 2], 3, timeout_s=10.0)
    assert len(stores) == 3
    stores[2].set("hello", "from rank 2")
    assert stores[0].get("hello") == stores[1].get("hello") == b"from rank 2"
    assert not stores[0].check(["address"]), "something of an earlier attempt is in it"


def test_a_rank_that_stays_alone_says_so_in_time():
    timeout = datetime.timedelta(seconds=5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout)
    store.set("word/1", "dead")
    with pytest.raises(TimeoutError, match="rank 0 met not all of the 2 ranks within"):
        agree(store, 0, 2, 0.5)
