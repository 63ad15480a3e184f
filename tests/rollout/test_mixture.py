"""Several tasks in one run: ratios, curriculum, resumption, and nobody waits for a slow one."""

import asyncio
import itertools
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.buffer import DataBuffer
from rollout.buffer_state import BufferState, Lease
from rollout.config import CurriculumConfig, DataConfig, RolloutConfig, SamplingConfig
from rollout.data import PromptStream, demonstrations
from rollout.domain import Domain
from rollout.filters import GroupFilters
from rollout.generate import Generator
from rollout.journal import drop_steps
from rollout.mixed_buffer import MixedBuffer, MixedState
from rollout.mixture import domain_seed, read_domains
from rollout.producer import Producer
from rollout.rewards import REWARDS
from rollout.shares import Shares, turns, whole_parts
from rollout.types import Group
from rollout.wire import decode, encode
from tests.rollout.conftest import sorted_digits
from tests.rollout.fakes import ScriptedClient, SlowEnvironment

WEIGHTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(weights=WEIGHTS, start=st.integers(0, 90), count=st.integers(1, 60))
def test_turns_are_in_exact_ratio_whole_rounds_and_from_any_place(weights, start, count):
    parts = whole_parts({f"d{k}": weight for k, weight in enumerate(weights)})
    period = sum(parts.values())
    rounds = Counter(name for name, _ in turns(parts, 0, 3 * period))
    assert rounds == {name: 3 * part for name, part in parts.items()}
    assert turns(parts, start, count) == turns(parts, 0, start + count)[start:]
    for name, seen in Counter(name for name, _ in turns(parts, 0, count)).items():
        assert abs(seen - count * parts[name] / period) < len(weights)
    for name in parts:
        mine = [place for each, place in turns(parts, 0, count) if each == name]
        assert mine == list(range(len(mine)))


def test_credits_of_other_weights_do_not_starve_a_domain():
    """A curriculum counts in millionths: its credits would last for thousands of steps."""
    learning = CurriculumConfig(enabled=True)
    before = Shares({"a": 1, "b": 2}, 7, learning)
    before.observe("a", 7, 8)
    before.decide(6)
    for _ in range(7):
        before.delivered()
    state = before.state_dict()
    assert any(abs(each) > 1000 for each in state.credits.values())
    after = Shares({"a": 1, "b": 1}, 8)
    after.load_state_dict(state, 7)
    after.decide(8)
    assert after.through("a", 8) - after.through("a", 6) == 8


def test_weights_are_taken_as_they_are_written():
    assert whole_parts({"a": 0.1, "b": 0.2}) == {"a": 1, "b": 2}
    assert whole_parts({"a": 3.0, "b": 1.0}) == {"a": 3, "b": 1}


def sizes(shares: Shares, name: str, steps: int) -> list[int]:
    """Groups of each of the first steps; nothing was delivered."""
    through = [0, *(shares.through(name, step) for step in range(steps))]
    return [after - before for before, after in itertools.pairwise(through)]


def test_every_step_has_whole_shares_and_rounds_what_is_not_whole():
    shares = Shares({"a": 3, "b": 1}, 8)
    shares.decide(4)
    assert sizes(shares, "a", 5) == [6] * 5
    shares = Shares({"a": 2, "b": 1}, 4)
    shares.decide(5)
    assert sum(sizes(shares, "a", 3)) == 8
    assert set(sizes(shares, "a", 6)) == {2, 3}
    assert [a + b for a, b in zip(sizes(shares, "a", 6), sizes(shares, "b", 6), strict=True)] == (
        [4] * 6
    )


def test_a_curriculum_moves_weight_to_where_half_is_right():
    """By hand: pass rates .5 -> .75 and .5 with a memory of 2 steps; 4 p (1 - p) = .75 and 1."""
    curriculum = CurriculumConfig(enabled=True, floor=0.2, memory_steps=2.0)
    shares = Shares({"known": 1, "new": 1}, 100, curriculum)
    shares.decide(0)
    assert shares.through("known", 0) == 50
    shares.observe("known", 7, 7)
    shares.observe("known", 3, 3)
    shares.observe("new", 5, 10)
    shares.delivered()
    assert shares.pass_rates == {"known": 0.75, "new": 0.5}
    assert shares.weights()["known"] == pytest.approx(0.8 / 1.8, abs=1e-6)  # .2 + .8 * .75
    shares.decide(1)
    assert shares.through("known", 1) - 50 == 44
    for _ in range(40):
        shares.observe("known", 9, 9)
        shares.observe("new", 0, 9)
        shares.delivered()
        shares.decide(shares._first)
    assert shares.weights()["known"] == pytest.approx(0.5, abs=1e-3), "both at the floor"


def test_a_state_goes_on_as_if_nothing_had_stopped():
    curriculum = CurriculumConfig(enabled=True)
    weights = {"a": 1.0, "b": 2.5, "c": 0.3}

    def advance(shares: Shares, step: int) -> list[int]:
        shares.decide(step)
        counts = [shares.through(name, step) - shares.through(name, step - 1) for name in weights]
        for k, name in enumerate(weights):
            shares.observe(name, (step * (k + 1)) % 7, 7)
        shares.delivered()
        return counts

    whole = Shares(weights, 7, curriculum)
    expected = [advance(whole, step) for step in range(20)]
    assert all(sum(counts) == 7 for counts in expected)
    first = Shares(weights, 7, curriculum)
    for step in range(9):
        advance(first, step)
    second = Shares(weights, 7, curriculum)
    second.load_state_dict(first.state_dict(), 9)
    assert [advance(second, step) for step in range(9, 20)] == expected[9:]
    with pytest.raises(ValueError, match=r"data\.mixture=\['a', 'b'\].*\['a', 'b', 'c'\]"):
        Shares({"a": 1.0, "b": 2.5}, 7).load_state_dict(first.state_dict(), 9)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    eta=st.integers(0, 3),
    num_steps=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
)
def test_ratios_and_bound_hold_whoever_is_slow(weights, eta, num_steps, seed):
    """Domains of arbitrary speed, with drops and restarts from saved state in between."""
    names = {f"d{k}": float(weight) for k, weight in enumerate(weights)}
    per_step, choices = sum(weights), Random(seed)

    def fresh() -> MixedBuffer:
        return MixedBuffer(
            groups_per_step=per_step, max_staleness_steps=eta, num_steps=num_steps, weights=names
        )

    def finish(domain: str, lease) -> None:
        group = Group(group_id=lease.group_id, start_version=lease.start_version, samples=[])
        if lease.group_id % 5 == 0:
            buffer.drop(group, "fifth", domain)
        else:
            buffer.accept(group, domain)

    buffer, running, trained = fresh(), [], []
    buffer.publish(0)
    for action in range(10_000):
        if len(trained) == num_steps * per_step:
            break
        domain = choices.choice(list(names))
        if (lease := buffer.lease(domain)) is not None:
            running.append((domain, lease))
        if running and choices.random() < 0.7:
            finish(*running.pop(choices.randrange(len(running))))
        if action % 50 == 49:
            state = decode(encode(buffer.state_dict()), MixedState)
            state.check()
            buffer, running = fresh(), []
            buffer.load_state_dict(state)
        step = buffer.next_step
        if (batch := buffer.take()) is not None:
            assert {name: len(groups) for name, groups in batch.items()} == {
                f"d{k}": weight for k, weight in enumerate(weights)
            }
            for groups in batch.values():
                assert all(step - group.start_version <= eta for group in groups)
                trained += [group.group_id for group in groups]
            if buffer.next_step < num_steps:
                buffer.publish(buffer.next_step)
    assert len(set(trained)) == num_steps * per_step


MIXTURE = {
    "quick": {"weight": 3, "task": "sort", "args": {"num_digits": 3}},
    "slow": {
        "task": "tests.rollout.fakes.SlowEnvironment",
        "timeout_s": 50,
        "sampling": {"max_new_tokens": 9},
        "filters": ["failed"],
    },
}


def test_a_domain_has_what_it_says_and_else_what_the_run_has():
    data = DataConfig(reward="exact_match", timeout_s=7.0, mixture=MIXTURE, max_concurrency=4)
    rollout = RolloutConfig(filters=["dynamic_sampling"])
    quick, slow = read_domains(data, rollout).values()
    assert (quick.weight, quick.data.task, quick.data.args) == (3.0, "sort", {"num_digits": 3})
    assert (quick.data.reward, quick.data.timeout_s) == ("environment", 7.0)
    assert quick.filters == ["dynamic_sampling"]
    assert (slow.weight, slow.data.args, slow.data.timeout_s) == (1.0, {}, 50.0)
    assert (slow.sampling.max_new_tokens, slow.sampling.temperature) == (9, 1.0)
    assert (slow.filters, slow.data.max_concurrency) == (["failed"], 4)
    assert not quick.data.mixture


def producer_of(chat, rollouts, eta: int, mixture=MIXTURE, **changes) -> Producer:
    """The mixture above: 3 + 1 groups a step; the slow task's environments wait for their gate."""
    client = ScriptedClient(chat, sorted_digits)
    data = DataConfig(mixture=mixture)
    domains = read_domains(data, RolloutConfig())
    return Producer(
        buffer=MixedBuffer(
            groups_per_step=4,
            max_staleness_steps=eta,
            weights={name: each.weight for name, each in domains.items()},
            **changes,
        ),
        domains=[
            Domain(
                name=name,
                prompts=PromptStream(each.data, domain_seed(0, name), "train"),
                generator=Generator(
                    client=client,  # pyright: ignore[reportArgumentType]
                    chat=chat,
                    sampling=each.sampling,
                    reward=REWARDS["environment"],
                    timeout_s=60.0,
                ),
                filters=GroupFilters(each.filters),
                samples_per_prompt=2,
                seed=0,
                max_running_groups=2,
            )
            for name, each in domains.items()
        ],
        rollouts=rollouts,
    )


def test_slow_groups_hold_no_place_of_the_quick_ones(chat, tmp_path, monkeypatch):
    async def scenario() -> None:
        gate = asyncio.Event()
        monkeypatch.setattr(SlowEnvironment, "gate", gate, raising=False)
        producer = producer_of(chat, tmp_path, eta=3)
        producer.publish(0)
        async with asyncio.timeout(10):
            async with producer._changed:
                await producer._changed.wait_for(lambda: producer.buffer.num_accepted == 3 * 4)
        assert producer.buffer.num_running == 2, "slow ones, as many as may run"
        assert await producer.batch(0, 0.2) is None, "a step has its share of each"
        gate.set()
        delivered = await producer.batch(0, 10)
        assert delivered is not None
        batch, samples = delivered
        assert Counter(sample.domain for sample in samples) == {"quick": 6, "slow": 2}
        assert batch.metrics["rollout/quick/accuracy"] == 1.0
        slow = batch.metrics["rollout/slow/reward_mean"]
        assert slow in (0.0, 1.0)
        assert batch.metrics["rollout/slow/groups"] == 1.0
        assert batch.metrics["rollout/reward_mean"] == pytest.approx((3 + slow) / 4)
        await producer.close()

    asyncio.run(scenario())


def test_a_mixture_of_one_domain_has_its_figures(chat, tmp_path):
    async def scenario() -> None:
        producer = producer_of(chat, tmp_path, 0, {"only": MIXTURE["quick"]})
        producer.publish(0)
        delivered = await producer.batch(0, 10)
        assert delivered is not None
        metrics = delivered[0].metrics
        figures = [metrics[f"rollout/only/{name}"] for name in ("groups", "weight", "accuracy")]
        assert figures == [4.0, 1.0, 1.0]
        await producer.close()

    asyncio.run(scenario())


def test_a_mixture_goes_on_from_its_state_with_the_same_groups(chat, tmp_path, monkeypatch):
    """Staleness 0, a curriculum, groups in flight at the stop: N + N steps are 2N."""
    curriculum = CurriculumConfig(enabled=True, memory_steps=2.0)

    async def steps(producer: Producer, first: int, last: int) -> list:
        found = []
        for step in range(first, last):
            for domain in producer.domains:
                domain.generator.client.version = step  # pyright: ignore
            producer.publish(step)
            delivered = await producer.batch(step, 10)
            assert delivered is not None
            found.append(
                [(s.group_id, s.domain, s.reward, s.tokens.tolist()) for s in delivered[1]]
            )
        return found

    async def scenario() -> None:
        gate = asyncio.Event()
        gate.set()
        monkeypatch.setattr(SlowEnvironment, "gate", gate, raising=False)
        whole = producer_of(chat, tmp_path / "whole", 0, curriculum=curriculum)
        first = producer_of(chat, tmp_path / "parts", 0, curriculum=curriculum)
        for each in (whole, first):
            each._rollouts.mkdir()
        expected = await steps(whole, 0, 8)
        assert len({len([x for x in step if x[1] == "slow"]) for step in expected}) > 1
        found = await steps(first, 0, 4)
        state = await first.state_dict(4)
        first.publish(4)  # in flight, and lost
        await first.close()
        drop_steps(first._rollouts, 4)
        second = producer_of(chat, tmp_path / "parts", 0, curriculum=curriculum)
        await second.go_back(4, decode(encode(state), type(state)))
        assert found + await steps(second, 4, 8) == expected
        await second.close()

    asyncio.run(scenario())


def group_of(lease: Lease) -> Group:
    return Group(group_id=lease.group_id, start_version=lease.start_version, samples=[])


def leases_of(buffer: DataBuffer) -> list[Lease]:
    return list(iter(buffer.lease, None))  # pyright: ignore[reportReturnType]


def test_those_that_finish_first_are_trained_and_the_others_dropped():
    buffer = DataBuffer(groups_per_step=4, max_staleness_steps=0, num_steps=2, oversample=0.5)
    buffer.publish(0)
    leases = leases_of(buffer)
    assert [lease.group_id for lease in leases] == list(range(6))
    for k in (5, 2, 4, 1):
        assert not buffer.may_take()
        buffer.accept(group_of(leases[k]))
    counts = buffer.dropped
    assert [g.group_id for g in buffer.take() or []] == [1, 2, 4, 5]
    assert (buffer.aborted, counts["surplus"]) == ([0, 3], 2)
    assert (buffer.num_running, leases_of(buffer)) == (0, []), "none starts for a step that is over"
    with pytest.raises(ValueError, match="group 0 is not running"):
        buffer.accept(group_of(leases[0]))
    again = DataBuffer(groups_per_step=4, max_staleness_steps=0, num_steps=2, oversample=0.5)
    again.load_state_dict(decode(encode(buffer.state_dict()), BufferState))
    again.publish(1)
    assert [lease.group_id for lease in leases_of(again)] == list(range(6, 12))


def test_a_step_does_not_wait_for_those_that_are_late(chat, tmp_path, monkeypatch):
    """Oversampling: the slow task's second group waits for ever, and is aborted."""

    async def scenario() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        waiting = [first, first, second, second]
        monkeypatch.setattr(
            SlowEnvironment, "gate", property(lambda self: waiting.pop(0)), raising=False
        )
        producer = producer_of(chat, tmp_path, 0, oversample=1.0)
        producer.publish(0)
        assert producer.buffer.num_running == 2 + 2
        first.set()
        delivered = await producer.batch(0, 10)
        assert delivered is not None
        batch, samples = delivered
        assert Counter(sample.domain for sample in samples) == {"quick": 6, "slow": 2}
        assert batch.metrics["rollout/dropped/surplus"] >= 1
        async with asyncio.timeout(10):
            await asyncio.gather(*producer._tasks, return_exceptions=True)
        assert producer.buffer.num_running == 0
        assert [domain.num_running for domain in producer.domains] == [0, 0]
        await producer.close()

    asyncio.run(scenario())


def test_the_next_step_has_the_places_of_those_that_end_late(chat, tmp_path, monkeypatch):
    """The aborted group clears up until after the next publish(), in the slow task's only place."""

    async def scenario() -> None:
        ready, both_late, cleared = asyncio.Event(), asyncio.Event(), asyncio.Event()
        ready.set()

        class Late:
            async def wait(self) -> None:
                if len(waiting) == 2:
                    both_late.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await cleared.wait()

        waiting = [ready, ready, Late(), Late(), ready, ready]
        monkeypatch.setattr(
            SlowEnvironment, "gate", property(lambda self: waiting.pop(0)), raising=False
        )
        producer = producer_of(chat, tmp_path, 0, oversample=1.0)
        quick, slow = producer.domains
        slow.max_running_groups = 1
        producer.publish(0)
        async with asyncio.timeout(10):
            await both_late.wait()
            assert await producer.batch(0, 10) is not None
            slow.generator.client.version = 1  # pyright: ignore[reportAttributeAccessIssue]
            producer.publish(1)
            async with producer._changed:
                await producer._changed.wait_for(lambda: producer.buffer.num_accepted == 3 + 3)
            await asyncio.sleep(0.01)
        assert (quick.num_running, slow.num_running) == (0, 1), "the late one still clears up"
        cleared.set()
        delivered = await producer.batch(1, 5)
        assert delivered is not None, "its place was never used again"
        assert Counter(sample.domain for sample in delivered[1]) == {"quick": 6, "slow": 2}
        await producer.close()
        assert not producer._tasks

    asyncio.run(scenario())


def test_demonstrations_come_in_the_ratio_and_are_a_function_of_their_place(chat):
    data = DataConfig(
        mixture={
            "short": {"weight": 2, "task": "sort", "args": {"num_digits": 2}},
            "long": {"weight": 1, "task": "sort", "args": {"num_digits": 6}},
        }
    )
    made = demonstrations(data, chat.tokenizer, 0, 0, 9)
    assert Counter(sample.response_length for sample in made) == {3: 6, 7: 3}
    later = demonstrations(data, chat.tokenizer, 0, 4, 3)
    assert [s.tokens.tolist() for s in later] == [s.tokens.tolist() for s in made[4:7]]
    assert [sample.group_id for sample in later] == [4, 5, 6]


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"a b": {}}, r"data\.mixture\.a b: choose another name"),
        ({"reward": {}}, r"data\.mixture\.reward: choose another name"),
        ({"a": 3}, r"data\.mixture\.a=3: must be a mapping"),
        ({"a": {"tsk": "sort"}}, r"data\.mixture\.a\.tsk: unknown; one of weight, .*task"),
        ({"a": {"path": "x"}}, r"data\.mixture\.a\.path: unknown"),
        ({"a": {"weight": 0}}, r"data\.mixture\.a\.weight=0: must be at least 1e-06"),
        ({"a": {"weight": "much"}}, r"data\.mixture\.a\.weight='much': must be a number"),
        ({"a": {"weight": float("nan")}}, r"data\.mixture\.a\.weight=nan"),
        ({"a": {"timeout_s": "long"}}, r"data\.mixture\.a\.timeout_s=long: .*Float"),
        ({"a": {"sampling": {"temp": 1}}}, r"data\.mixture\.a\.sampling\.temp: unknown"),
        ({"a": {"sampling": {"stop": 1}}}, r"data\.mixture\.a\.sampling\.stop=1"),
        ({"a": {"filters": "failed"}}, r"data\.mixture\.a\.filters='failed': must be a list"),
        ({"a": {"max_running_groups": 1.5}}, r"max_running_groups=1\.5: must be a whole number"),
    ],
)
def test_rows_that_say_nothing_usable_are_refused(mixture, said):
    with pytest.raises(ValueError, match=said):
        read_domains(DataConfig(mixture=mixture), RolloutConfig(sampling=SamplingConfig()))
