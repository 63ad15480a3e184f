import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rollout.bounds import turn
from rollout.client import EngineFailure, EngineRefusal, Generation
from rollout.config import RolloutBatch, SamplingConfig
from rollout.environments.base import EnvironmentStep, Message
from rollout.generate import Episode, Generator
from rollout.greedy import run_with_baseline
from rollout.prompt_bound import bound_prompts
from rollout.rewards import REWARDS, GroupReward, Reward, Task
from rollout.rewards.weighted import RewardTerm, weighted
from rollout.tokens import Chat
from rollout.types import Sample, Status
from rollout.wire import decode, encode
from tests.rollout.fakes import EchoEnvironment, ScriptedClient


def last_question(text: str) -> str:
    return text[-2:]


def run(
    chat: Chat, environments: list[EchoEnvironment], **changes
) -> tuple[list[Sample], ScriptedClient]:
    answer, version = changes.pop("answer", last_question), changes.pop("engine_version", 0)
    client = changes.pop("client", None) or ScriptedClient(chat, answer, version)
    version = changes.pop("version", 0)
    settings = {
        "client": client,
        "chat": chat,
        "sampling": SamplingConfig(max_new_tokens=16),
        "reward": REWARDS["environment"],
        "timeout_s": 0.2,
    }
    generator = Generator(**(settings | changes))
    episodes = [
        Episode(environment=environment, group_id=3, index=k, seed=100 + k)
        for k, environment in enumerate(environments)
    ]
    return asyncio.run(generator.run(episodes, version)), client


def test_a_group_costs_one_engine_call_for_its_first_turn(chat):
    samples, client = run(chat, [EchoEnvironment(seed=0, num_turns=1) for _ in range(4)])
    assert client.calls == [[100, 101, 102, 103]]
    for k, sample in enumerate(samples):
        assert (sample.group_id, sample.index, sample.reward, sample.status) == (
            3,
            k,
            1.0,
            "stopped",
        )
        assert chat.text(sample.tokens) == "<bos>q0q0<eos>"
        assert sample.loss_mask.tolist() == [1, 1, 1]
        assert sample.rewards == {"environment": 1.0}
        assert sample.metadata["answer"] == "q0"


def test_turns_of_the_environment_are_not_trained_on(chat):
    (sample,), client = run(chat, [EchoEnvironment(seed=0, num_turns=3)])
    assert chat.text(sample.tokens) == "<bos>q0q0<eos>q1q1<eos>q2q2<eos>"
    assert sample.loss_mask.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert sample.turn_starts.tolist() == [0, 5, 10]
    assert sample.turn_rewards == [1.0, 1.0, 1.0]
    assert sample.turn_states == ["turn 0", "turn 1", "turn 2"], "this environment tells no state"
    assert sample.reward == 3.0
    assert (sample.versions[sample.loss_mask == 0] == -1).all()
    seeds = [seed for call in client.calls for seed in call]
    assert len(set(seeds)) == 3
    again, _ = run(chat, [EchoEnvironment(seed=0, num_turns=3)])
    assert np.array_equal(again[0].tokens, sample.tokens)


class PaysNothingReal(EchoEnvironment):
    async def step(self, reply: str) -> EnvironmentStep:
        return replace(await super().step(reply), reward=float("nan"))


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_reward_that_is_no_number_costs_its_own_sample(chat, weight):
    """Also where another reward takes its place; and what is left of it can be journaled."""
    environments = [PaysNothingReal(seed=0, num_turns=2), EchoEnvironment(seed=0, num_turns=2)]
    samples, _ = run(chat, environments, environment_weight=weight, timeout_s=5.0)
    assert [sample.status for sample in samples] == [Status.FAILED, Status.STOPPED]
    assert "the reward is nan" in samples[0].metadata["error"]
    for sample in samples:
        sample.check()
        assert decode(encode(sample), Sample).turn_rewards == sample.turn_rewards


def test_turns_are_paid_what_the_reward_holds_of_it(chat):
    """Where another reward takes the environment's place no turn has earned anything."""
    for weight, paid in ((0.5, 0.5), (0.0, 0.0)):
        (sample,), _ = run(chat, [EchoEnvironment(seed=0, num_turns=2)], environment_weight=weight)
        assert sample.turn_rewards == [paid, paid]


def test_the_token_budget_covers_all_turns(chat):
    sampling = SamplingConfig(max_new_tokens=7)
    (sample,), _ = run(chat, [EchoEnvironment(seed=0, num_turns=3)], sampling=sampling)
    assert sample.status is Status.TRUNCATED
    assert sample.response_length == 7
    assert sample.reward == 1.0  # the second reply was cut off: not scored


class WordyEnvironment(EchoEnvironment):
    """Its second message is as long as told."""

    length = 0

    async def step(self, reply: str) -> EnvironmentStep:
        step = await super().step(reply)
        for message in step.messages:
            message["content"] = "7" * self.length
        return step


@pytest.mark.parametrize(
    ("length", "kept"), [(12, [1, 1, 1, *[0] * 12, 1]), (13, [1] * 3), (20_000, [1] * 3)]
)
def test_what_leaves_no_room_for_an_answer_ends_the_episode_before_it(chat, length, kept):
    """Of 16 tokens: a batch is made for no more, and a journaled one that does not fit stays."""
    environment = WordyEnvironment(seed=0)
    environment.length = length
    (sample,), client = run(chat, [environment])
    assert sample.status is Status.TRUNCATED
    assert sample.loss_mask.tolist() == kept
    assert sample.reward == 1.0, "what the first turn earned"
    assert len(client.calls) == (2 if length == 12 else 1)


class LongPrompt(EchoEnvironment):
    """Begins with so many characters, tokens of the tiny model."""

    length = 16

    async def initial_messages(self) -> list[Message]:
        return [{"role": "user", "content": "7" * self.length}]


class SmallClient(ScriptedClient):
    """An engine that takes requests up to so many tokens."""

    context = 17

    async def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[int], **named
    ) -> list[Generation]:
        if max(map(len, prompts)) > self.context:
            raise EngineRefusal(f"status 400: {max(map(len, prompts))} tokens are too many")
        return await super().generate(prompts, sampling, seeds, **named)


def test_a_prompt_beyond_the_trainers_budget_is_never_sampled_from(chat):
    """16 characters and a <bos> are 17 tokens; of 32 a response of 16 leaves 16."""
    for budget, overlong, fits in (
        *((33, "refuse", True), (32, "refuse", False)),
        *((18, "truncate", True), (17, "truncate", False)),
    ):
        batch = RolloutBatch(max_tokens_per_microbatch=budget, overlong=overlong)
        environments = [EchoEnvironment(seed=0, num_turns=1), LongPrompt(seed=0, num_turns=1)]
        prompts = bound_prompts(batch, cp=1, max_new_tokens=16)
        (good, long), client = run(chat, environments, prompts=prompts)
        assert good.reward == 1.0
        assert (long.status is not Status.FAILED) == fits
        assert client.calls == [[100, 101][: 1 + fits]]
        if not fits:
            said = long.metadata["error"]
            assert said.startswith("prompt: ValueError: a prompt of 17 tokens, more than the 16 ")
            assert f"batch.max_tokens_per_microbatch={budget}" in said
            assert not long.loss_mask.any()


def test_sequences_are_counted_as_they_are_padded():
    batch = RolloutBatch(max_tokens_per_microbatch=103, overlong="refuse")
    assert bound_prompts(batch, cp=4, max_new_tokens=16).max_tokens == 96 - 16


def test_what_the_engine_does_not_take_costs_its_own_sample_only(chat):
    environments = [EchoEnvironment(seed=0), LongPrompt(seed=0), EchoEnvironment(seed=0)]
    environments[1].length = 17
    client = SmallClient(chat, last_question)
    first, long, last = run(chat, environments, client=client, timeout_s=5.0)[0]
    assert (first.reward, last.reward) == (2.0, 2.0)
    assert long.status is Status.FAILED
    assert long.metadata["error"] == "prompt: status 400: 18 tokens are too many"
    talkative = WordyEnvironment(seed=0)
    talkative.length = 12  # 17 tokens fit no more
    (sample,) = run(chat, [talkative], client=client, timeout_s=5.0)[0]
    assert sample.metadata["error"] == "turn 1: status 400: 18 tokens are too many"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("prompt", "no prompt today"),
        ("odd prompt", "prompt: "),
        ("describe", "describe: LookupError: who am I"),
        ("raises", "boom"),
        ("hangs", "no answer within 0.2 s"),
        ("no step", "step: AttributeError"),
        ("no message", "step: "),
    ],
)
def test_a_failing_environment_costs_its_own_sample_only(chat, trouble, reason):
    environments = [EchoEnvironment(seed=0), EchoEnvironment(seed=0, trouble=trouble)]
    (good, bad), _ = run(chat, environments)
    assert (good.status, good.reward) == (Status.STOPPED, 2.0)
    assert bad.status is Status.FAILED
    assert reason in bad.metadata["error"]
    assert not bad.loss_mask.any()
    assert bad.reward == 0.0
    bad.check()


async def raising(sample: Sample, task: Task) -> Reward:
    raise ZeroDivisionError("in a reward")


async def hanging(sample: Sample, task: Task) -> Reward:
    await asyncio.sleep(3600)
    return Reward(value=0.0)


async def infinite(sample: Sample, task: Task) -> Reward:
    return Reward(value=float("inf"))


async def odd(sample: Sample, task: Task) -> Reward:
    return Reward(value=1.0, components={"style": float("nan")})


async def wordy(sample: Sample, task: Task) -> Reward:
    return Reward(value="much")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raising, "ZeroDivisionError"),
        (hanging, "reward: no answer"),
        (infinite, "reward is inf"),
        (odd, "style is nan"),
        (wordy, "reward: ValueError"),
    ],
)
def test_a_failing_reward_is_a_status_not_a_stall(chat, reward, reason):
    (sample,), _ = run(chat, [EchoEnvironment(seed=0)], reward=reward)
    assert sample.status is Status.FAILED
    assert reason in sample.metadata["error"]
    assert not sample.loss_mask.any()


@pytest.mark.parametrize("alone", [True, False])
def test_a_reward_that_waits_for_its_turn_is_not_late(chat, alone):
    """Eight that take 0.15 s each, one at a time, bounded by half a second."""
    places = asyncio.Semaphore(1)

    async def queueing(sample: Sample, task: Task) -> Reward:
        async with turn(places):
            await asyncio.sleep(0.15)
        return Reward(value=1.0)

    term = RewardTerm(kind="mine", timeout_s=0.5)
    reward = queueing if alone else weighted({"mine": (term, queueing)})
    environments = [EchoEnvironment(seed=0) for _ in range(8)]
    samples, _ = run(chat, environments, reward=reward, timeout_s=0.5)
    assert [sample.reward for sample in samples] == [1.0] * 8


class StubbornEnvironment(EchoEnvironment):
    """Takes no notice of being cancelled, as `except:` in a loop of retries does; once, for the
    test has to end."""

    async def step(self, reply: str) -> EnvironmentStep:
        try:
            await asyncio.sleep(3600)
        except BaseException:
            await asyncio.sleep(3600)
        return EnvironmentStep()


@pytest.mark.timeout(20, func_only=True)
def test_what_cannot_be_cancelled_holds_up_nobody(chat, monkeypatch):
    monkeypatch.setattr("rollout.boundary._CLEAR_UP_S", 0.2)
    environments = [EchoEnvironment(seed=0), StubbornEnvironment(seed=0)]
    (good, bad), _ = run(chat, environments, places=asyncio.Semaphore(1))
    assert (good.status, good.reward) == (Status.STOPPED, 2.0)
    assert bad.metadata["error"] == "step: no answer within 0.2 s"


class HeldEnvironment(EchoEnvironment):
    """Counts how often it was given up."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        if self.trouble == "close":
            raise OSError("cannot let go")


class GoneClient(ScriptedClient):
    async def generate(self, *given, **named):
        raise EngineFailure("all engines are gone")


@pytest.mark.parametrize("trouble", ["", "prompt", "raises", "hangs", "close"])
def test_environments_are_closed_however_their_episodes_end(chat, trouble):
    environment = HeldEnvironment(seed=0, trouble=trouble)
    (sample,), _ = run(chat, [environment])
    assert environment.closed > 0
    assert (sample.status is Status.FAILED) == (trouble in ("prompt", "raises", "hangs"))
    if not trouble:
        held = HeldEnvironment(seed=0)
        with pytest.raises(EngineFailure):
            run(chat, [held], client=GoneClient(chat, last_question))
        assert held.closed > 0


def of_groups(rewards: Callable[[list[Task]], list[Reward]]) -> tuple[GroupReward, list[int]]:
    """A reward of whole groups, and how many samples each of its calls has had."""
    sizes = []

    async def reward(samples: list[Sample], tasks: list[Task]) -> list[Reward]:
        sizes.append(len(samples))
        assert [sample.metadata for sample in samples] == [task.description for task in tasks]
        return rewards(tasks)

    return GroupReward(reward), sizes


def ranks(tasks: list[Task]) -> list[Reward]:
    order = sorted(task.environment_reward for task in tasks)
    return [Reward(value=order.index(task.environment_reward)) for task in tasks]


def test_a_reward_of_groups_sees_all_answers_to_a_prompt_in_one_call(chat):
    """And none that failed. With one place to run at a time, too: nobody waits in it."""
    reward, sizes = of_groups(ranks)
    environments = [EchoEnvironment(seed=0, num_turns=n) for n in (3, 1, 2)]
    environments.insert(1, EchoEnvironment(seed=0, trouble="raises"))
    sampling = SamplingConfig(max_new_tokens=60)
    samples, _ = run(
        chat, environments, reward=reward, places=asyncio.Semaphore(1), sampling=sampling
    )
    assert sizes == [3]
    assert [sample.reward for sample in samples] == [2.0, 0.0, 0.0, 1.0]
    assert [sample.status is Status.FAILED for sample in samples] == [False, True, False, False]


def test_prompts_of_one_request_are_groups_by_themselves(chat):
    reward, sizes = of_groups(ranks)
    client = ScriptedClient(chat, last_question)
    generator = Generator(
        client=client,  # pyright: ignore[reportArgumentType]
        chat=chat,
        sampling=SamplingConfig(),
        reward=reward,
        timeout_s=1.0,
    )
    episodes = [
        Episode(environment=EchoEnvironment(seed=0), group_id=group_id, index=0, seed=k)
        for k, group_id in enumerate((7, 8, 7))
    ]
    asyncio.run(generator.run(episodes, 0))
    assert sorted(sizes) == [1, 2]


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        (lambda tasks: [Reward(value=1.0)], "reward: ValueError: 1 rewards of 2 samples"),
        (lambda tasks: 1 / 0, "reward: ZeroDivisionError"),
        (lambda tasks: [1.0, 2.0], "reward: AttributeError"),
        (lambda tasks: None, "reward: TypeError"),
    ],
)
def test_a_failing_reward_of_groups_is_the_status_of_all_its_samples(chat, rewards, reason):
    reward, _ = of_groups(rewards)
    samples, _ = run(chat, [EchoEnvironment(seed=0) for _ in range(2)], reward=reward)
    for sample in samples:
        assert sample.status is Status.FAILED
        assert sample.metadata["error"].startswith(reason)
        assert not sample.loss_mask.any()


def test_one_reward_of_a_group_that_is_no_number_costs_its_own_sample(chat):
    reward, _ = of_groups(lambda tasks: [Reward(value=float("nan")), Reward(value=2.0)])
    bad, good = run(chat, [EchoEnvironment(seed=0) for _ in range(2)], reward=reward)[0]
    assert (bad.status, bad.metadata) == (Status.FAILED, {"error": "reward is nan"})
    assert (good.status, good.reward) == (Status.STOPPED, 2.0)


class NumberEnvironment(EchoEnvironment):
    """Answers with a number where text is declared, as arithmetic tasks easily do."""

    def describe(self) -> dict[str, str]:
        return {"answer": 42}  # pyright: ignore[reportReturnType]


async def numpy_reward(sample: Sample, task: Task) -> Reward:
    components: dict = {"length": np.float64(2), "n": np.int64(3)}
    return Reward(value=np.float32(1), components=components)  # pyright: ignore[reportArgumentType]


def test_what_foreign_code_gives_can_be_journaled_and_sent(chat):
    (sample,), _ = run(chat, [NumberEnvironment(seed=0, num_turns=1)], reward=numpy_reward)
    (again,) = decode(encode([sample]), list[Sample])
    assert again.metadata == {"answer": "42"}
    assert (again.reward, again.rewards) == (1.0, {"length": 2.0, "n": 3.0})


def test_tokens_of_weights_older_than_published_stop_the_run(chat):
    with pytest.raises(EngineFailure, match=r"version 1 where the run is at 2"):
        run(chat, [EchoEnvironment(seed=0)], version=2, engine_version=1)


class RecordingClient(ScriptedClient):
    """Right answers to samples, a wrong one where the temperature is 0."""

    async def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, seeds: list[int], **named
    ) -> list[Generation]:
        self.calls.append(seeds)
        answer = (lambda text: "no") if sampling.temperature == 0 else last_question
        return await ScriptedClient(self.chat, answer).generate(prompts, sampling, seeds)


@pytest.mark.parametrize("trouble", ["", "raises"])
def test_the_greedy_answer_is_the_others_baseline_and_not_trained_on(chat, trouble):
    client = RecordingClient(chat, last_question)
    generator = Generator(
        client=client,  # pyright: ignore[reportArgumentType]
        chat=chat,
        sampling=SamplingConfig(max_new_tokens=16),
        reward=REWARDS["environment"],
        timeout_s=0.2,
    )
    troubles = ["", "", trouble]  # the last one's is the greedy answer's environment
    episodes = [
        Episode(
            environment=EchoEnvironment(seed=0, num_turns=1, trouble=each),
            group_id=3,
            index=k,
            seed=100 + k,
        )
        for k, each in enumerate(troubles)
    ]
    samples = asyncio.run(run_with_baseline(generator, episodes, 0))
    assert sorted(client.calls) == [[100, 101], [102]]
    assert [sample.index for sample in samples] == [0, 1]
    if not trouble:
        assert [(sample.reward, sample.baseline_reward) for sample in samples] == [(1.0, 0.0)] * 2
        return
    for sample in samples:  # nothing to compare with: they train nothing, and say why
        assert sample.status is Status.FAILED
        assert "the greedy answer: step: KeyError" in sample.metadata["error"]
        assert not sample.loss_mask.any()
