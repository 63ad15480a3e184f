"""The plan of a step: which rank trains which samples in which micro-batch. Pure Python.

A function of lengths and layout alone, computed alike on every rank: nothing is broadcast.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


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
) -> list[UpdatePlan]:
    """Split the samples of a step into `num_updates` updates, and each update into micro-batches.

    Args:
        lengths: tokens of every sample, prompt and response.
        dp: data-parallel ranks.
        max_tokens: budget of one micro-batch.
        num_updates: optimizer steps on this batch; samples are dealt to them in order.
        length_multiple: every sequence is padded to a multiple of this (2 * cp under context
            parallelism).
        microbatch_multiple: every rank runs a multiple of this many micro-batches (interleaved
            pipelines need a multiple of their stages).

    Raises:
        ValueError: a sample is longer than the budget; there are fewer samples than updates.
    """
    if len(lengths) < num_updates:
        raise ValueError(
            f"algorithm.updates_per_step={num_updates} needs that many samples; the batch has "
            f"{len(lengths)}"
        )
    padded = [-(-length // length_multiple) * length_multiple for length in lengths]
    longest = max(range(len(padded)), key=padded.__getitem__)
    if padded[longest] > max_tokens:
        raise ValueError(
            f"sample {longest} has {padded[longest]} tokens, more than "
            f"batch.max_tokens_per_microbatch={max_tokens}: raise it, or lower "
            "rollout.sampling.max_new_tokens"
        )
    bounds = [len(lengths) * i // num_updates for i in range(num_updates + 1)]
    return [
        _plan_update(padded, range(bounds[i], bounds[i + 1]), dp, max_tokens, microbatch_multiple)
        for i in range(num_updates)
    ]


def _plan_update(
    lengths: Sequence[int], members: range, dp: int, max_tokens: int, multiple: int
) -> UpdatePlan:
    """Longest first into the emptiest of dp * n bins; n grows until everything fits."""
    order = sorted(members, key=lambda i: (-lengths[i], i))
    total = sum(lengths[i] for i in members)
    num = max(1, -(-total // (dp * max_tokens * multiple))) * multiple
    while (bins := _fill(lengths, order, dp * num, max_tokens)) is None:
        num += multiple
    # Heaviest bins first, dealt there and back, so that ranks carry about the same in all.
    bins.sort(key=lambda b: (-sum(lengths[i] for i in b), b))
    ranks: list[list[list[int]]] = [[] for _ in range(dp)]
    for k, members_of_bin in enumerate(bins):
        row, place = divmod(k, dp)
        ranks[place if row % 2 == 0 else dp - 1 - place].append(sorted(members_of_bin))
    return UpdatePlan(ranks)


def _fill(
    lengths: Sequence[int], order: Sequence[int], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    heap = [(0, k) for k in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for i in order:
        load, k = heap[0]
        if load + lengths[i] > max_tokens:  # the emptiest bin has no room, so none has
            return None
        heapq.heapreplace(heap, (load + lengths[i], k))
        bins[k].append(i)
    return bins
