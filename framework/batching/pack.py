"""Sizes into bins of one capacity: as few bins as possible, and even ones where there is room.

Works on sizes alone (equal sizes are interchangeable); `framework.batching.plan` names the samples
afterwards. Integers only, no clock and no randomness: the same answer on every machine.
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from itertools import accumulate

Bins = list[list[int]]

# Work bounds of the searches. They are counts, not seconds: a plan must not depend on the clock.
_FILL_NODES = 48
_REPAIR_ROUNDS = 4


def least_bins(sizes: Sequence[int], capacity: int) -> int:
    """A number of bins that no packing can beat (Martello and Toth's L2).

    At least the volume over the capacity, and at least the number of sizes over half of it.

    Args:
        sizes: descending, none above the capacity.
    """
    ascending = list(reversed(sizes))
    sums = [0, *accumulate(ascending)]
    num, half = len(sizes), bisect_right(ascending, capacity // 2)
    best = max(-(-sums[num] // capacity), num - half)
    # For a threshold k: sizes above capacity - k share a bin with nothing of size k or more; the
    # other large ones are alone too, but leave room for what is from k up to half the capacity.
    for k in sorted(set(ascending[:half])):
        first, alone = bisect_left(ascending, k), bisect_right(ascending, capacity - k)
        room = (alone - half) * capacity - (sums[alone] - sums[half])
        rest = sums[half] - sums[first] - room
        best = max(best, num - half + max(0, -(-rest // capacity)))
    return best


def pack(
    sizes: Sequence[int], num_bins: int, capacity: int, cost: Mapping[int, int]
) -> Bins | None:
    """All sizes in exactly `num_bins` bins, or None where no way was found.

    Where there is room the bins cost about the same; where there is little they are filled by
    search. No bin stays empty while another one holds two.

    Args:
        sizes: descending, none above the capacity.
    """
    if sum(sizes) > num_bins * capacity:
        return None
    tokens = dict(zip(sizes, sizes, strict=True))
    for even in (cost, tokens):
        if (spread := _spread(sizes, num_bins, capacity, even)) is not None:
            return spread
    for packer in (_best_fit, _fill_by_search):
        bins, left = packer(sizes, num_bins, capacity)
        if not left or _repair(bins, left, capacity):
            _occupy_empty(bins)
            return bins
    return None


def _spread(
    sizes: Sequence[int], num_bins: int, capacity: int, cost: Mapping[int, int]
) -> Bins | None:
    """Largest first into the cheapest bin with room; gives up when room is hard to find."""
    bins: Bins = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    heap = [(0, k) for k in range(num_bins)]
    patience = 4 * (len(sizes) + num_bins)
    for size in sizes:
        skipped = []
        while heap and loads[heap[0][1]] + size > capacity:
            skipped.append(heapq.heappop(heap))
        patience -= len(skipped)
        if not heap or patience < 0:
            return None
        spent, k = heap[0]
        heapq.heapreplace(heap, (spent + cost[size], k))
        bins[k].append(size)
        loads[k] += size
        for entry in skipped:
            heapq.heappush(heap, entry)
    return bins


def _best_fit(sizes: Sequence[int], num_bins: int, capacity: int) -> tuple[Bins, list[int]]:
    """Largest first into the fullest bin with room; also what did not fit."""
    bins: Bins = [[] for _ in range(num_bins)]
    rooms = [(capacity, k) for k in range(num_bins)]
    left = []
    for size in sizes:
        place = bisect_left(rooms, (size, -1))
        if place == len(rooms):
            left.append(size)
            continue
        room, k = rooms.pop(place)
        bins[k].append(size)
        insort(rooms, (room - size, k))
    return bins, left


def _fill_by_search(sizes: Sequence[int], num_bins: int, capacity: int) -> tuple[Bins, list[int]]:
    """One bin after the other: the largest size left, then what fills the rest of the bin best.

    A bin may waste its share of the room to spare, and within that share takes the largest sizes it
    can, so that the small ones, which fit anywhere, are there at the end.
    """
    rest = list(reversed(sizes))
    bins: Bins = []
    spare = num_bins * capacity - sum(sizes)
    for k in range(num_bins):
        if not rest:
            bins.append([])
            continue
        members = [rest.pop()]
        gap = capacity - members[0]
        allowed = max(0, spare) // (num_bins - k)
        while rest and rest[0] <= gap:
            chosen = _best_filling(rest, gap, allowed)
            for size in chosen:
                del rest[bisect_left(rest, size)]
                gap -= size
            members += chosen
        spare -= gap
        bins.append(members)
    return bins, rest


def _best_filling(rest: list[int], gap: int, allowed: int) -> list[int]:
    """Up to three of `rest` (ascending) that leave least of the gap; the first within `allowed`."""
    best: list[int] = []
    best_left = gap
    nodes = _FILL_NODES
    first = bisect_right(rest, gap) - 1
    while first >= 0 and nodes > 0:
        left = gap - rest[first]
        if left < best_left:
            best, best_left = [rest[first]], left
            if left <= allowed:
                return best
        second = bisect_right(rest, left, 0, first) - 1
        tries = 6
        while second >= 0 and tries > 0:
            tries -= 1
            nodes -= 1
            left2 = left - rest[second]
            if left2 < best_left:
                best, best_left = [rest[first], rest[second]], left2
                if left2 <= allowed:
                    return best
            third = bisect_right(rest, left2, 0, second) - 1
            if third >= 0 and left2 - rest[third] < best_left:
                best = [rest[first], rest[second], rest[third]]
                best_left = left2 - rest[third]
                if best_left <= allowed:
                    return best
            second -= 1
        nodes -= 1
        first -= 1
    return best


def _repair(bins: Bins, left: list[int], capacity: int) -> bool:
    """Find places for what is left: dissolve the loosest bins and fill as many anew, in place.

    Every round that leaves less is kept; after one that does not, twice as many are dissolved.
    """
    share = 4
    for _ in range(_REPAIR_ROUNDS):
        order = sorted(range(len(bins)), key=lambda k: sum(bins[k]))
        opened = order[: share * len(left)]
        pool = sorted([*left, *(size for k in opened for size in bins[k])], reverse=True)
        filled, rest = _fill_by_search(pool, len(opened), capacity)
        if sum(rest) < sum(left):
            for k, members in zip(opened, filled, strict=True):
                bins[k] = members
            left = rest
            if not left:
                return True
        else:
            share *= 2
    return False


def _occupy_empty(bins: Bins) -> None:
    """Give every empty bin the largest size of a bin that holds several."""
    empty = [k for k, members in enumerate(bins) if not members]
    heap = [(-len(members), k) for k, members in enumerate(bins) if len(members) > 1]
    heapq.heapify(heap)
    for k in empty:
        if not heap:
            return
        count, donor = heap[0]
        bins[k].append(bins[donor].pop(bins[donor].index(max(bins[donor]))))
        if count + 1 < -1:
            heapq.heapreplace(heap, (count + 1, donor))
        else:
            heapq.heappop(heap)
