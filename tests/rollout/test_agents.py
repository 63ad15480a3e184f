"""The generation seam: programs of the user's own that play episodes."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from rollout.agents import AgentTask, PolicyEngine, find_generate
from rollout.client import EngineFailure, EngineRefusal
from rollout.config import SamplingConfig
from rollout.generate import Episode, Generator
from rollout.prompt_bound import PromptBound
from rollout.rewards import REWARDS
from rollout.scoring import number_samples
from rollout.tokens import Chat, Transcript
from rollout.types import Sample, Status
from tests.rollout.fakes import EchoEnvironment, ScriptedClient


async def turn(engine: PolicyEngine, transcript: Transcript, sampling: SamplingConfig) -> str:
    generation = await engine.generate(transcript.tokens, sampling)
    transcript.add_reply(
        generation.token_ids.tolist(), generation.logprobs.tolist(), generation.versions.tolist()
    )
    return engine.text(generation)


async def with_sub_agents(
    engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig
) -> list[Sample]:
    """Two sub-agents side by side, then a main agent that reads what they said."""
    subs = [Transcript(engine.chat.tokens(f"<bos>{name}")) for name in ("q7", "q8")]
    replies = await asyncio.gather(*(turn(engine, each, sampling) for each in subs))
    main = Transcript(engine.chat.prompt(await task.environment.initial_messages()))
    await turn(engine, main, sampling)
    main.add_observation(engine.chat.tokens("".join(replies)))
    await turn(engine, main, sampling)
    return [task.sample(main, reward=1.0), *(task.sample(each, reward=0.5) for each in subs)]


async def raising(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    raise LookupError("no idea")


async def hanging(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    await asyncio.sleep(3600)


async def empty(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    return []


async def wordy(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    return ["a sample"]


async def endless(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    transcript = Transcript([1])
    transcript.add_reply([5] * 99, [-1.0] * 99, [0] * 99)
    return [task.sample(transcript)]


async def deaf(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    """Swallows whatever the engine raises."""
    try:
        await engine.generate([1], sampling)
    except Exception as error:
        transcript = Transcript([1])
        transcript.add_reply([5], [-1.0], [0])
        return [task.sample(transcript, metadata={"swallowed": str(error)})]


async def two_arguments(engine: PolicyEngine, task: AgentTask) -> list[Sample]:
    return []


def no_coroutine(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig) -> list[Sample]:
    return []


class BrokenClient(ScriptedClient):
    error: EngineFailure = EngineFailure("all engines are gone")

    async def generate(self, prompts, sampling, seeds, **named):
        raise self.error


def run(chat: Chat, play, client: ScriptedClient | None = None, count: int = 2, **changes):
    generator = Generator(
        client=client or ScriptedClient(chat, lambda text: text[-2:]),  # pyright: ignore
        chat=chat,
        sampling=SamplingConfig(max_new_tokens=40),
        reward=REWARDS["environment"],
        timeout_s=5.0,
        play=play,
        episode_timeout_s=0.3,
    )
    episodes = [
        Episode(environment=EchoEnvironment(seed=0), group_id=3, index=k, seed=100 + k)
        for k in range(count)
    ]
    return asyncio.run(replace(generator, **changes).run(episodes, 0))


def test_an_episode_may_give_several_samples_each_with_its_turns(chat):
    client = ScriptedClient(chat, lambda text: text[-2:])
    samples = run(chat, with_sub_agents, client)
    assert [(s.group_id, s.index, s.reward) for s in samples] == [
        (3, k // 3, [1.0, 0.5, 0.5][k % 3]) for k in range(6)
    ]
    assert [sample.index for sample in number_samples(samples)] == [*range(6)]
    main, sub = samples[0], samples[1]
    assert chat.text(main.tokens) == "<bos>q0q0<eos>q7q8q8<eos>"
    assert main.loss_mask.tolist() == [1] * 3 + [0] * 4 + [1] * 3
    assert main.turn_starts.tolist() == [0, 7]
    assert chat.text(sub.tokens) == "<bos>q7q7<eos>"
    assert main.metadata["answer"] == "q0"
    seeds = [seed for call in client.calls for seed in call]
    assert len(set(seeds)) == len(seeds) == 8  # of two episodes with four calls each
    again = ScriptedClient(chat, lambda text: text[-2:])
    assert np.array_equal(run(chat, with_sub_agents, again)[0].tokens, main.tokens)
    assert sorted(again.calls) == sorted(client.calls)


async def replies_right(sample, task):
    from rollout.rewards import Reward

    return Reward(value=float(task.replies == ["q0", "q8"]))


def test_rewards_see_the_recorded_replies(chat):
    samples = run(chat, with_sub_agents, count=1, reward=replies_right)
    assert [sample.reward for sample in samples] == [1.0, 0.0, 0.0]


def test_a_programs_own_prompts_are_bounded_too(chat):
    bound = PromptBound(max_tokens=2, reason="more than 2")
    (sample,) = run(chat, with_sub_agents, count=1, prompts=bound)
    assert sample.metadata["error"] == "generate: ValueError: a prompt of 3 tokens, more than 2"


@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (raising, "generate: LookupError: no idea"),
        (hanging, "generate: no answer within 0.3 s"),
        (empty, "returned list; a list of at least one Sample"),
        (wordy, "returned a str where a Sample is wanted"),
        (endless, "99 tokens; rollout.sampling.max_new_tokens=40"),
    ],
)
def test_a_failing_program_is_one_failed_sample(chat, play, reason):
    (sample,) = run(chat, play, count=1)
    assert sample.status is Status.FAILED
    assert reason in sample.metadata["error"]
    assert not sample.loss_mask.any()


def test_a_dead_engine_ends_the_run_and_a_refused_request_only_the_episode(chat):
    client = BrokenClient(chat, str)
    with pytest.raises(EngineFailure, match="all engines are gone"):
        run(chat, deaf, client)
    client.error = EngineRefusal("too long for me")
    (sample,) = run(chat, deaf, client, count=1)
    assert sample.metadata["swallowed"] == "too long for me"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nosuch", "must be environment, agent, or package.module.function"),
        ("tests.rollout.test_agents.nosuch", "has no nosuch"),
        ("tests.rollout.test_agents.two_arguments", r"must take \(engine, task, sampling\)"),
        ("tests.rollout.test_agents.no_coroutine", "is not an `async def`"),
    ],
)
def test_what_is_no_generate_function_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        find_generate(name)
    assert find_generate("tests.rollout.test_agents.deaf").__name__ == "deaf"


async def with_routes(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
    transcript = Transcript([1])
    transcript.add_reply([5], [-1.0], [0], routes=np.zeros((1, 4), dtype=np.uint8))
    return [task.sample(transcript)]


def test_a_program_that_forgets_the_routes_is_told_before_a_trainer_misses_them(chat):
    (kept,) = run(chat, with_routes, count=1, routes=True)
    assert kept.status is Status.STOPPED
    (sample,) = run(chat, with_sub_agents, count=1, routes=True)
    assert sample.status is Status.FAILED
    assert "return_routes=true wants: give add_reply(..., routes=" in sample.metadata["error"]
