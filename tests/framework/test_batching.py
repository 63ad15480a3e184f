"""The plan of a step: every sample once, no budget exceeded, equal counts, even ranks."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.batching import plan_step
from framework.batching.pack import least_bins, pack

BUDGET = 40_960


def quadratic(length):
    return length * (17_000 + length)


def rank_costs(plan, lengths, cost=quadratic):
    return [
        sum(cost(lengths[i]) for i in plan.samples_of(rank))
        for rank in range(len(plan.microbatches))
    ]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=4, max_size=60),
    dp=st.integers(1, 8),
    max_tokens=st.integers(100, 300),
    num_updates=st.integers(1, 4),
    multiple=st.sampled_from([1, 4]),
    microbatch_multiple=st.sampled_from([1, 2, 4]),
    pipelined=st.booleans(),
)
def test_plan_is_complete_legal_and_within_budget(
    lengths, dp, max_tokens, num_updates, multiple, microbatch_multiple, pipelined
):
    arguments = {
        "dp": dp,
        "max_tokens": max_tokens,
        "num_updates": num_updates,
        "length_multiple": multiple,
        "microbatch_multiple": microbatch_multiple,
        "pipelined": pipelined,
        "cost": quadratic,
    }
    plans = plan_step(lengths, **arguments)
    assert plans == plan_step(tuple(lengths), **arguments)
    assert len(plans) == num_updates
    seen = [i for plan in plans for rank in range(dp) for i in plan.samples_of(rank)]
    assert sorted(seen) == list(range(len(lengths)))
    for plan in plans:
        assert len(plan.microbatches) == dp
        assert {len(rank) for rank in plan.microbatches} == {plan.num_microbatches}
        assert plan.num_microbatches % microbatch_multiple == 0
        microbatches = [each for rank in plan.microbatches for each in rank]
        for microbatch in microbatches:
            padded = [-(-lengths[i] // multiple) * multiple for i in microbatch]
            assert sum(padded) <= max_tokens
        # A rank runs padding only where there are fewer samples than micro-batches.
        count = sum(map(len, microbatches))
        assert sum(map(bool, microbatches)) == min(count, len(microbatches))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9), capacity=st.integers(50, 70))
def test_least_bins_is_a_bound_and_the_usual_bounds_are_no_better(sizes, capacity):
    def fewest(rest, rooms):
        """By trying everything."""
        if not rest:
            return len(rooms)
        best = len(rooms) + len(rest)
        for k in {room: k for k, room in enumerate(rooms) if room >= rest[0]}.values():
            after = [*rooms[:k], rooms[k] - rest[0], *rooms[k + 1 :]]
            best = min(best, fewest(rest[1:], after))
        return min(best, fewest(rest[1:], [*rooms, capacity - rest[0]]))

    sizes.sort(reverse=True)
    bound = least_bins(sizes, capacity)
    usual = max(-(-sum(sizes) // capacity), sum(2 * size > capacity for size in sizes))
    assert usual <= bound <= fewest(sizes, [])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=2, max_size=12),
    st.integers(0, 3),
)
def test_packing_never_loses_or_overfills(groups, spare):
    """Bins known to be possible are found, or refused whole; never a partial or illegal answer."""
    capacity = max(map(sum, groups))
    sizes = sorted((size for group in groups for size in group), reverse=True)
    bins = pack(sizes, len(groups) + spare, capacity, {size: quadratic(size) for size in sizes})
    if bins is None:
        assert spare == 0  # only ever missed where everything must fit exactly
        return
    assert len(bins) == len(groups) + spare
    assert sorted((size for members in bins for size in members), reverse=True) == sizes
    assert max(map(sum, bins)) <= capacity


def draw(kind, count, seed):
    generator = random.Random(seed)
    lengths = {
        "uniform": lambda: generator.uniform(256, 32_768),
        "log-normal": lambda: generator.lognormvariate(8, 1),
        "pareto": lambda: 800 * generator.paretovariate(1.2),
        "bimodal": lambda: generator.gauss(
            *((1e3, 250) if generator.random() < 0.8 else (3e4, 2e3))
        ),
        "short": lambda: generator.gammavariate(2, 300),
    }[kind]
    return [min(32_768, max(1, int(lengths()))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["uniform", "log-normal", "pareto", "bimodal", "short"])
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_the_least_and_ranks_are_even(kind, seed):
    lengths = draw(kind, 512, seed)
    (plan,) = plan_step(lengths, dp=8, max_tokens=BUDGET, cost=quadratic)
    volume = -(-sum(lengths) // BUDGET)
    large = sum(2 * length > BUDGET for length in lengths)
    assert plan.num_microbatches == -(-max(volume, large) // 8)
    costs = rank_costs(plan, lengths)
    assert max(costs) * 8 <= 1.001 * sum(costs)


def test_bins_full_to_the_brim_are_balanced_too():
    """512 samples that fill 99 % of the budget: no size can move, so several change places."""
    lengths = draw("pareto", 512, 118)
    capacity = -(-sum(lengths) // 32) * 100 // 99
    (plan,) = plan_step(lengths, dp=8, max_tokens=capacity, cost=quadratic)
    assert plan.num_microbatches == 4
    costs = rank_costs(plan, lengths)
    assert max(costs) * 8 <= 1.01 * sum(costs)


def test_a_plan_depends_on_nothing_but_its_arguments():
    """Pinned: another machine, Python or hash seed must give the very same plan."""
    lengths = [1 + 37 * i * i % 97 for i in range(24)]
    (plan,) = plan_step(lengths, dp=2, max_tokens=256, cost=quadratic)
    assert plan.microbatches == [
        [[3, 7, 14, 17], [12, 18, 20], [0, 5, 6, 19]],
        [[1, 8, 9, 11, 21], [2, 4, 16, 23], [10, 13, 15, 22]],
    ]


def test_order_pairs_equals_and_a_pipeline_starts_and_ends_cheaply():
    lengths = draw("log-normal", 256, 5)
    for pipelined in (False, True):
        (plan,) = plan_step(lengths, dp=4, max_tokens=BUDGET, cost=quadratic, pipelined=pipelined)
        for rank in plan.microbatches:
            costs = [sum(quadratic(lengths[i]) for i in microbatch) for microbatch in rank]
            if pipelined:
                peak = costs.index(max(costs))
                assert costs[: peak + 1] == sorted(costs[: peak + 1])
                assert costs[peak:] == sorted(costs[peak:], reverse=True)
                assert {costs[0], costs[-1]} == set(sorted(costs)[:2])
            else:
                assert costs == sorted(costs, reverse=True)


def test_updates_take_samples_in_order():
    first, second = plan_step([5] * 8, dp=1, max_tokens=100, num_updates=2)
    assert sorted(first.samples_of(0)) == [0, 1, 2, 3]
    assert sorted(second.samples_of(0)) == [4, 5, 6, 7]


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"sample 1 has 300 tokens.*max_tokens_per_microbatch=200"):
        plan_step([10, 300], dp=1, max_tokens=200)


def test_an_empty_sample_is_named():
    with pytest.raises(ValueError, match="sample 1 has no tokens"):
        plan_step([10, 0], dp=1, max_tokens=200)


def test_more_updates_than_samples_is_refused():
    with pytest.raises(ValueError, match=r"updates_per_step=3 .* the batch has 2"):
        plan_step([10, 10], dp=1, max_tokens=200, num_updates=3)
