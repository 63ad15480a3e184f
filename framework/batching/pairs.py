"""The plan of a step whose samples are pairs, compared with each other in one loss. Pure Python."""

from collections.abc import Callable, Sequence

from framework.batching.plan import UpdatePlan, plan_step


def plan_pairs(
    lengths: Sequence[int],
    *,
    dp: int,
    max_tokens: int,
    length_multiple: int = 1,
    microbatch_multiple: int = 1,
    pipelined: bool = False,
    cost: Callable[[int], int] | None = None,
) -> UpdatePlan:
    """One update; samples 2p and 2p + 1 lie side by side in the same micro-batch.

    Arguments are those of `plan_step`; a pair is to it a sample of both lengths together.

    Raises:
        ValueError: a pair is longer than the budget.
    """
    padded = [-(-length // length_multiple) * length_multiple for length in lengths]
    sizes = [a + b for a, b in zip(padded[::2], padded[1::2], strict=True)]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[longest] > max_tokens:
        raise ValueError(
            f"pair {longest} has {sizes[longest]} tokens in its two samples, which are trained "
            f"together, more than batch.max_tokens_per_microbatch={max_tokens}: raise it, or set "
            "batch.overlong=truncate"
        )
    # By its size alone a pair costs what two samples of half of it do.
    (plan,) = plan_step(
        sizes,
        dp=dp,
        max_tokens=max_tokens,
        microbatch_multiple=microbatch_multiple,
        pipelined=pipelined,
        cost=None if cost is None else lambda size: 2 * cost(-(-size // 2)),
    )
    return UpdatePlan(
        [
            [[i for p in bin_ for i in (2 * p, 2 * p + 1)] for bin_ in rank]
            for rank in plan.microbatches
        ]
    )
