"""The plan of a step: every sample once, no budget exceeded, equally many micro-batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.batching import plan_step


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=4, max_size=60),
    dp=st.integers(1, 8),
    max_tokens=st.integers(100, 300),
    num_updates=st.integers(1, 4),
    multiple=st.sampled_from([1, 4]),
)
def test_plan_is_complete_legal_and_within_budget(lengths, dp, max_tokens, num_updates, multiple):
    plans = plan_step(
        lengths,
        dp=dp,
        max_tokens=max_tokens,
        num_updates=num_updates,
        length_multiple=multiple,
    )
    assert len(plans) == num_updates
    seen = [i for plan in plans for rank in range(dp) for i in plan.samples_of(rank)]
    assert sorted(seen) == list(range(len(lengths)))
    for plan in plans:
        assert len(plan.microbatches) == dp
        assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
        for rank in plan.microbatches:
            for microbatch in rank:
                padded = [-(-lengths[i] // multiple) * multiple for i in microbatch]
                assert sum(padded) <= max_tokens


def test_ranks_carry_about_the_same():
    lengths = [10 + 7 * i % 50 for i in range(256)]
    (plan,) = plan_step(lengths, dp=8, max_tokens=1024)
    loads = [sum(lengths[i] for i in plan.samples_of(rank)) for rank in range(8)]
    assert max(loads) / (sum(loads) / 8) < 1.02


def test_updates_take_samples_in_order():
    first, second = plan_step([5] * 8, dp=1, max_tokens=100, num_updates=2)
    assert sorted(first.samples_of(0)) == [0, 1, 2, 3]
    assert sorted(second.samples_of(0)) == [4, 5, 6, 7]


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"sample 1 has 300 tokens.*max_tokens_per_microbatch=200"):
        plan_step([10, 300], dp=1, max_tokens=200)


def test_more_updates_than_samples_is_refused():
    with pytest.raises(ValueError, match=r"updates_per_step=3 .* the batch has 2"):
        plan_step([10, 10], dp=1, max_tokens=200, num_updates=3)
