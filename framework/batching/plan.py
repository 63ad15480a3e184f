"""The plan of a step: which rank trains which samples in which micro-batch. Pure Python.

    lengths, layout -> least_bins -> pack -> balance -> names and order -> UpdatePlan

A function of lengths and layout alone, computed alike on every rank: nothing is broadcast. All
arithmetic is on integers and every tie is broken by index, so it is alike on every machine too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from framework.batching.balance import balance
from framework.batching.pack import Bins, least_bins, pack


@dataclass(frozen=True)
class UpdatePlan:
    """One optimizer step: microbatches[dp_rank][k] are indices of samples; each sample once."""

    microbatches: list[list[list[int]]]

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of each data-parallel rank (the same number for all)."""
        return len(self.microbatches[0])

    def samples_of(self, dp_rank: int) -> list[int]:
        """All samples of one data-parallel rank, in the order of their micro-batches."""
        return [i for microbatch in self.microbatches[dp_rank] for i in microbatch]


def plan_step(
    lengths: Sequence[int],
    *,
    dp: int,
    max_tokens: int,
    num_updates: int = 1,
    length_multiple: int = 1,
    microbatch_multiple: int = 1,
    pipelined: bool = False,
    cost: Callable[[int], int] | None = None,
) -> list[UpdatePlan]:
    """Split the samples of a step into `num_updates` updates, and each update into micro-batches.

    Micro-batches are as few as a search finds (nearly always as few as can be), equally many on
    every rank, none over the budget, and ranks cost about the same. One is empty only where there
    are fewer samples than micro-batches.

    Args:
        lengths: tokens of every sample, prompt and response.
        dp: data-parallel ranks.
        max_tokens: budget of one micro-batch.
        num_updates: optimizer steps on this batch; samples are dealt to them in order.
        length_multiple: every sequence is padded to a multiple of this (2 * cp under context
            parallelism).
        microbatch_multiple: a rank's number of micro-batches is a multiple of this (pp under
            interleaved pipelining).
        pipelined: the cheapest micro-batches of a rank go to both ends, where a pipeline fills and
            drains; else the dearest go first, so that memory peaks at once.
        cost: work of one sequence by its padded length, growing with it (see framework.flops);
            None: its length.

    Raises:
        ValueError: a sample is empty or longer than the budget; there are fewer samples than
            updates.
    """
    if len(lengths) < num_updates:
        raise ValueError(
            f"algorithm.updates_per_step={num_updates} needs that many samples; the batch has "
            f"{len(lengths)}"
        )
    if min(lengths) < 1:
        raise ValueError(f"sample {lengths.index(min(lengths))} has no tokens")
    padded = [-(-length // length_multiple) * length_multiple for length in lengths]
    longest = max(range(len(padded)), key=padded.__getitem__)
    if padded[longest] > max_tokens:
        raise ValueError(
            f"sample {longest} has {padded[longest]} tokens, more than "
            f"batch.max_tokens_per_microbatch={max_tokens}: raise it, lower "
            "rollout.sampling.max_new_tokens, or set batch.overlong=truncate"
        )
    price = _prices(padded, cost)
    bounds = [len(lengths) * i // num_updates for i in range(num_updates + 1)]
    plans = []
    for first, last in pairwise(bounds):
        members = range(first, last)
        sizes = sorted((padded[i] for i in members), reverse=True)
        ranks = _plan_sizes(sizes, dp, max_tokens, microbatch_multiple, price)
        for rank in ranks:
            _order(rank, price, pipelined)
        plans.append(UpdatePlan(_name_samples(ranks, padded, members)))
    return plans


def _prices(padded: list[int], cost: Callable[[int], int] | None) -> dict[int, int]:
    """The cost of every size; without the common divisor, as small integers add faster."""
    price = {size: size if cost is None else cost(size) for size in set(padded)}
    unit = gcd(*price.values())
    return {size: value // unit for size, value in price.items()}


def _plan_sizes(
    sizes: list[int], dp: int, max_tokens: int, multiple: int, price: dict[int, int]
) -> list[Bins]:
    """ranks[r][k] = sizes of a micro-batch; sizes descending."""
    step = dp * multiple
    num_bins = -(-least_bins(sizes, max_tokens) // step) * step
    while (bins := pack(sizes, num_bins, max_tokens, price)) is None:
        num_bins += step
    return balance(bins, dp, max_tokens, price)


def _order(rank: Bins, price: dict[int, int], pipelined: bool) -> None:
    """Sort a rank's micro-batches in place; ranks agree, so that those run together weigh alike."""
    rank.sort(key=lambda members: (-sum(price[size] for size in members), members))
    if pipelined:
        rank[:] = [*rank[1::2][::-1], *rank[0::2]]


def _name_samples(ranks: list[Bins], padded: list[int], members: range) -> list[list[list[int]]]:
    """Sizes become samples: of equal sizes the first in order goes to the first place."""
    waiting: dict[int, list[int]] = {}
    for i in reversed(members):
        waiting.setdefault(padded[i], []).append(i)
    named = [[sorted(waiting[size].pop() for size in bin_) for bin_ in rank] for rank in ranks]
    assert not any(waiting.values()), "a sample is in no micro-batch"
    return named
