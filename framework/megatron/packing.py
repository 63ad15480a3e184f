"""Positions of packed sequences: pure functions of lengths, no tensors, no process group."""

import itertools
from collections.abc import Sequence


def zigzag_positions(cu_seqlens: Sequence[int], cp_size: int, cp_rank: int) -> list[int]:
    """Global positions that one context-parallel rank holds, in order.

    Each sequence is cut into 2 * cp_size equal chunks, of which rank r holds chunks r and
    2 * cp_size - 1 - r: the split that Transformer Engine and megatron's RoPE expect.

    Raises:
        ValueError: a sequence is not a multiple of 2 * cp_size long.
    """
    positions: list[int] = []
    for start, end in itertools.pairwise(cu_seqlens):
        if cp_size == 1:
            positions.extend(range(start, end))
            continue
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"a packed sequence of {end - start} tokens must be padded to a multiple of "
                f"2 * parallel.cp = {2 * cp_size}"
            )
        for i in (cp_rank, 2 * cp_size - 1 - cp_rank):
            positions.extend(range(start + i * chunk, start + (i + 1) * chunk))
    return positions


def padded_buckets(cu_seqlens: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group packed sequences by similar length: [(padded length, sequence numbers)].

    A bucket wastes at most an eighth of its positions (or 8 where sequences are short), so that
    attention can take it as one padded batch.
    """
    buckets: dict[int, list[int]] = {}
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        length = end - start
        if length == 0:
            continue
        grain = max(8, 1 << max(0, length.bit_length() - 4))
        buckets.setdefault(-(-length // grain) * grain, []).append(i)
    # Pad only to the longest that is there.
    longest = {
        key: max(cu_seqlens[i + 1] - cu_seqlens[i] for i in members)
        for key, members in buckets.items()
    }
    return [(longest[key], buckets[key]) for key in sorted(buckets)]
