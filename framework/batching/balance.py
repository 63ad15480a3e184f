"""Bins to ranks: equally many each, and as nearly as possible the same cost.

Beyond the longest-processing-time rule: whole bins change places between the dearest rank and a
cheaper one, then single sizes move or change places, always within the capacity of their bins.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import NamedTuple

from framework.batching.pack import Bins

# Ranks within 1 part in this of their mean are even: less than what kernels vary by.
_EVEN = 4096
# Bounds of the search, in counts: a plan must not depend on the clock.
_CHANGES_PER_RANK = 16
_PARTNERS = 8
"""Cheapest ranks that are tried before the dearest one counts as stuck."""
_PAIRED = 24
"""Bins of a rank, evenly spaced by cost, that are tried two at a time."""
_NEAR = 3
"""Sizes on either side of the wanted one that are tried for a bin with room."""


def balance(bins: Bins, num_ranks: int, capacity: int, cost: Mapping[int, int]) -> list[Bins]:
    """Deal bins to ranks, improve, and return ranks[r][k] = sizes of a bin.

    Args:
        bins: a multiple of num_ranks of them, each within the capacity.
        cost: of every size, growing with it; integers, whose sums are exact in any order.
    """
    costs = [sum(cost[size] for size in members) for members in bins]
    order = sorted(range(len(bins)), key=lambda k: (-costs[k], k))
    dealt: list[Bins] = [[] for _ in range(num_ranks)]
    totals = [(0, r) for r in range(num_ranks)]
    # A row of bins at a time, the dearest to the rank that is cheapest so far: equal counts, and
    # bins of about the same cost at the same place of every rank.
    for start in range(0, len(order), num_ranks):
        row = order[start : start + num_ranks]
        for (_, r), k in zip(totals, row, strict=True):
            dealt[r].append(bins[k])
        totals = sorted((total + costs[k], r) for (total, r), k in zip(totals, row, strict=True))
    ranks = [_Rank(members, capacity, cost) for members in dealt]
    _improve(ranks)
    return [rank.bins for rank in ranks]


class _Rank:
    """The bins of one rank, with what the search asks of them."""

    def __init__(self, bins: Bins, capacity: int, cost: Mapping[int, int]) -> None:
        self.bins = bins
        self._capacity = capacity
        self.cost = cost
        self.refresh(range(len(bins)))

    def refresh(self, changed: Sequence[int]) -> None:
        """Bring the figures up to date after these bins changed."""
        cost = self.cost
        if len(changed) == len(self.bins):
            self.rooms = [0] * len(self.bins)
            self._costs = [0] * len(self.bins)
        for k in changed:
            self.rooms[k] = self._capacity - sum(self.bins[k])
            self._costs[k] = sum([cost[size] for size in self.bins[k]])
        self.total = sum(self._costs)
        self.by_cost = sorted((spent, k) for k, spent in enumerate(self._costs))
        """(cost, bin), ascending."""
        # Costs grow with sizes, so one order serves for both.
        self.items = sorted([(size, k) for k, members in enumerate(self.bins) for size in members])
        """(size, bin), ascending."""
        self.item_costs = [cost[size] for size, _ in self.items]

    def bin_pairs(self) -> list[tuple[int, tuple[int, int]]]:
        """(cost of both, bins) of every two of up to _PAIRED bins, ascending."""
        bins = self.by_cost[:: -(-len(self.by_cost) // _PAIRED)]
        return sorted((a + b, (k, q)) for (a, k), (b, q) in combinations(bins, 2))


class _Change(NamedTuple):
    """What makes a dear rank cheaper by `gain` and a cheap one dearer by as much."""

    gain: int
    dear_bins: tuple[int, ...]
    cheap_bins: tuple[int, ...]
    given: int = 0
    """Size that leaves the dear rank's bin; 0: the bins change places whole."""
    taken: Sequence[int] = ()
    """Sizes that come back for it."""

    def apply(self, dear: _Rank, cheap: _Rank) -> None:
        """Carry it out."""
        for k, q in zip(self.dear_bins, self.cheap_bins, strict=True):
            source, target = dear.bins[k], cheap.bins[q]
            if not self.given:
                dear.bins[k], cheap.bins[q] = target, source
                continue
            source.remove(self.given)
            target.append(self.given)
            for size in self.taken:
                target.remove(size)
                source.append(size)
        dear.refresh(self.dear_bins)
        cheap.refresh(self.cheap_bins)


def _improve(ranks: Sequence[_Rank]) -> None:
    """Bring the dearest rank and a cheap one together until nothing helps the dearest."""
    standing = sorted((rank.total, r) for r, rank in enumerate(ranks))
    mean = sum(rank.total for rank in ranks) // len(ranks)
    for _ in range(_CHANGES_PER_RANK * len(ranks)):
        top, r = standing[-1]
        if (top - mean) * _EVEN <= mean:
            return
        for total, q in standing[: min(_PARTNERS, len(ranks) - 1)]:
            change = _best_change(ranks[r], ranks[q], min((top - total) // 2, top - mean))
            if change is not None:
                break
        else:
            return
        change.apply(ranks[r], ranks[q])
        standing.remove((top, r))
        standing.remove((total, q))
        insort(standing, (ranks[r].total, r))
        insort(standing, (ranks[q].total, q))


def _best_change(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    """The change whose gain is nearest `wanted`, nearer than none at all.

    `wanted` is at most half of what lies between the two, so neither ends above the dear one.
    """
    best: _Change | None = None
    miss = wanted
    for search in (_swap_bins, _move_item, _swap_items, _swap_bin_pairs, _swap_for_several):
        change = search(dear, cheap, wanted)
        if change is not None and abs(change.gain - wanted) < miss:
            best, miss = change, abs(change.gain - wanted)
        if miss * 8 < wanted:  # near enough: the next dearest rank is worth more than the rest
            break
    return best


def _swap_bins(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    best: _Change | None = None
    miss = wanted
    for spent, k in dear.by_cost:
        place = bisect_left(cheap.by_cost, (spent - wanted, -1))
        for other, q in cheap.by_cost[max(0, place - 1) : place + 1]:
            off = abs(spent - other - wanted)
            if off < miss:
                best, miss = _Change(spent - other, (k,), (q,)), off
    return best


def _swap_bin_pairs(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    """Two bins for two: finer than one for one, and open to bins that are full to the brim."""
    best: _Change | None = None
    miss = wanted
    pairs = cheap.bin_pairs()
    for spent, ks in dear.bin_pairs():
        place = bisect_left(pairs, (spent - wanted, (-1, -1)))
        for other, qs in pairs[max(0, place - 1) : place + 1]:
            off = abs(spent - other - wanted)
            if off < miss:
                best, miss = _Change(spent - other, ks, qs), off
    return best


def _move_item(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    """Into the emptiest bin; the last size of a bin stays, so that none is left empty."""
    room = max(cheap.rooms)
    q = cheap.rooms.index(room)
    place = bisect_left(dear.item_costs, wanted)
    for at in range(min(place, len(dear.items) - 1), -1, -1):
        size, k = dear.items[at]
        if size <= room and len(dear.bins[k]) > 1:
            return _Change(dear.item_costs[at], (k,), (q,), size)
    return None


def _swap_items(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    best: _Change | None = None
    miss = wanted
    costs, items, rooms = cheap.item_costs, cheap.items, cheap.rooms
    # Below `wanted`, moving the size would do more than exchanging it.
    for at in range(len(dear.items) - 1, bisect_left(dear.item_costs, wanted) - 1, -1):
        given_cost = dear.item_costs[at]
        given, k = dear.items[at]
        place = bisect_left(costs, given_cost - wanted)
        for other in range(max(0, place - _NEAR), min(len(items), place + _NEAR)):
            gain = given_cost - costs[other]
            off = abs(gain - wanted)
            if off < miss:
                taken, q = items[other]
                if given - taken <= rooms[q]:
                    best, miss = _Change(gain, (k,), (q,), given, (taken,)), off
        if miss * 8 < wanted:
            break
    return best


def _swap_for_several(dear: _Rank, cheap: _Rank, wanted: int) -> _Change | None:
    """One size for several neighbours in size of one bin: for ranks with no room to spare.

    As many tokens in small pieces are cheaper, since attention is quadratic.
    """
    best: _Change | None = None
    miss = wanted
    for k, source in enumerate(dear.bins):
        for q, target in enumerate(cheap.bins):
            pieces = sorted(target)
            tokens = [0, *accumulate(pieces)]
            spent = [0, *accumulate(cheap.cost[size] for size in pieces)]
            for given in set(source):
                least = given - cheap.rooms[q]
                most = given + dear.rooms[k]
                for start in range(len(pieces)):
                    stop = bisect_left(tokens, tokens[start] + least, start)
                    if len(source) == 1:
                        stop = max(stop, start + 1)  # nothing in return would leave it empty
                    for end in range(stop, min(stop + _NEAR, len(tokens))):
                        gain = dear.cost[given] - spent[end] + spent[start]
                        off = abs(gain - wanted)
                        if off < miss and tokens[end] - tokens[start] <= most:
                            best, miss = _Change(gain, (k,), (q,), given, pieces[start:end]), off
    return best
