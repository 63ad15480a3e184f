"""Pairs are never parted: the plan of a step of stage=preference."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.batching.pairs import plan_pairs


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=30),
    dp=st.integers(1, 4),
    multiple=st.sampled_from([1, 4]),
    microbatch_multiple=st.sampled_from([1, 2]),
    pipelined=st.booleans(),
)
def test_pairs_stay_together_within_the_budget(pairs, dp, multiple, microbatch_multiple, pipelined):
    lengths = [length for pair in pairs for length in pair]
    plan = plan_pairs(
        lengths,
        dp=dp,
        max_tokens=128,
        length_multiple=multiple,
        microbatch_multiple=microbatch_multiple,
        pipelined=pipelined,
        cost=lambda length: length * (100 + length),
    )
    assert len(plan.microbatches) == dp
    assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
    assert plan.num_microbatches % microbatch_multiple == 0
    seen = []
    for microbatch in (each for rank in plan.microbatches for each in rank):
        firsts, seconds = microbatch[::2], microbatch[1::2]
        assert [i % 2 for i in firsts] == [0] * len(firsts)
        assert seconds == [i + 1 for i in firsts]
        assert sum(-(-lengths[i] // multiple) * multiple for i in microbatch) <= 128
        seen += microbatch
    assert sorted(seen) == list(range(len(lengths)))


def test_a_pair_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"pair 1 has 104 tokens.*microbatch=100: raise it"):
        plan_pairs([10, 10, 49, 51], dp=1, max_tokens=100, length_multiple=4)
