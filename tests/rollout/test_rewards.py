"""Weighted rewards and those of services: values, retries, bounds; bad replies name the address."""

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import pytest
from aiohttp import web

from rollout.config import DataConfig
from rollout.rewards import (
    GroupReward,
    Reward,
    RewardFunction,
    Task,
    environment_weight,
    make_reward,
    punish_overlong,
)
from tests.rollout.test_wire import make_sample

TASK = Task(
    description={"prompt": "6*7=", "answer": "42"},
    replies=["it is {prompt} 42"],
    environment_reward=0.5,
)
JUDGE = {"model": "m", "template": "Rate {reply} for {prompt}", "pattern": r"score: (\S+)"}


def data(rewards: dict[str, Any], **fields: Any) -> DataConfig:
    """The data section with these rewards."""
    return DataConfig(rewards=rewards, **fields)


async def of_one(reward: RewardFunction | GroupReward) -> Reward:
    """What it gives to a sample."""
    assert not isinstance(reward, GroupReward)
    return await reward(make_sample(), TASK)


def score(rewards: dict[str, Any]) -> Reward:
    """What they give to a sample."""

    async def run() -> Reward:
        return await of_one(make_reward(data(rewards)))

    return asyncio.run(run())


class Answers:
    """A service that gives these (status, text) in order, the last of them for ever."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)
        self.bodies: list[Any] = []
        self.paths: list[str] = []

    async def handle(self, request: web.Request) -> web.Response:
        """One answer."""
        self.bodies.append(await request.json())
        self.paths.append(request.path)
        status, text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status == 0:
            await asyncio.sleep(60)
        return web.Response(status=status, text=text)


@contextlib.asynccontextmanager
async def serving(answers: Answers):
    """Its address."""
    app = web.Application()
    app.router.add_post("/{path:.*}", answers.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def ask(kind: str, answers: Answers, args: dict[str, Any] | None = None, **row: Any) -> Reward:
    """The reward `x` of one service."""

    async def run() -> Reward:
        async with serving(answers) as url:
            rows = {"x": {"kind": kind, "args": {"url": url, **(args or {})}, **row}}
            return await of_one(make_reward(data(rows)))

    return asyncio.run(run())


def chat(text: Any) -> str:
    """A chat completion that says this."""
    return json.dumps({"choices": [{"message": {"content": text}}]})


async def never(sample, task):
    """A reward that hangs."""
    await asyncio.sleep(60)


async def raising(sample, task):
    """A reward that raises."""
    raise KeyError("lost")


async def rubbish(sample, task):
    """A reward that is no number."""
    return Reward(value=float("nan"))


async def together(samples, tasks):
    """A reward of a whole group."""
    return [Reward(value=k) for k, _ in enumerate(samples)]


def test_a_reward_of_groups_is_told_by_its_signature_and_punished_too():
    reward = make_reward(DataConfig(reward="tests.rollout.test_rewards.together"))
    assert isinstance(reward, GroupReward)
    short, long = make_sample(0), make_sample(1)
    budget = long.response_length
    punished = punish_overlong(reward, max_tokens=budget, share=1.0, penalty=0.5)
    assert isinstance(punished, GroupReward)
    found = asyncio.run(punished([short, long], [TASK, TASK]))
    shares = [-0.5 * each.response_length / budget for each in (short, long)]
    assert [each.value for each in found] == [0 + shares[0], 1 + shares[1]]
    assert [each.components for each in found] == [{"overlong": each} for each in shares]


def test_terms_are_weighted_and_told_apart():
    rows = {"own": {"kind": "environment", "weight": 2.0}, "right": {"kind": "exact_match"}}
    reward = score(rows)
    assert reward.value == 1.0
    assert reward.components == {"own": 0.5, "right": 0.0}


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        (data({}, reward="environment"), 1.0),
        (data({}, reward="exact_match"), 0.0),
        (data({"own": {"kind": "environment", "weight": 2.0}, "b": {"kind": "math"}}), 2.0),
        (data({"b": {"kind": "math"}}), 0.0),
    ],
)
def test_what_an_environment_pays_for_a_turn_counts_as_far_as_it_is_in_the_reward(settings, weight):
    assert environment_weight(settings) == weight


def test_a_scorer_over_http_is_asked_again_when_busy():
    answers = Answers((503, "busy"), (429, "busy"), (200, '{"reward": 0.25}'))
    assert ask("http", answers, max_retries=2, weight=2.0).value == 0.5
    assert answers.bodies[0]["answer"] == "42"
    assert len(answers.bodies) == 3


def test_a_judge_reads_the_last_score():
    answers = Answers((200, chat("first score: 3, then\nscore: 8")))
    assert ask("judge", answers, {**JUDGE, "divide_by": 10}).value == 0.8
    assert answers.paths == ["/chat/completions"]
    # What a reply has in braces stays as it is.
    said = answers.bodies[0]["messages"][0]["content"]
    assert said == "Rate it is {prompt} 42 for 6*7="


def test_a_reward_model_scores_the_tokens_themselves():
    answers = Answers((200, '[{"embedding": [-1.5]}]'))
    assert ask("reward_model", answers).value == -1.5
    assert answers.bodies == [{"input_ids": make_sample().tokens.tolist()}]
    assert answers.paths == ["/classify"]


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("http", (200, "rubbish"), "no JSON"),
        ("http", (200, "[" * 100000), "no JSON"),
        ("http", (200, '{"reward": "1"}'), "'1' where"),
        ("http", (200, '{"reward": true}'), "True where"),
        ("http", (200, '{"reward": NaN}'), "nan where"),
        ("http", (200, '{"rewards": 1}'), "None where"),
        ("http", (200, "x" * (2 << 20)), "exceeds"),
        ("http", (404, "nothing here"), "status 404: nothing here"),
        ("http", (302, ""), "status 302"),
        ("http", (500, "broken"), r"status 500: broken \(1 attempts\)"),
        ("http", (0, ""), r"no answer within 0.5 s \(1 attempts\)"),
        ("judge", (200, "{}"), "no chat completion"),
        ("judge", (200, '{"choices": []}'), "no chat completion"),
        ("judge", (200, chat(None)), "no score"),
        ("judge", (200, chat("very good")), "no score"),
        ("judge", (200, chat("score: high")), "'high' is no number"),
        ("judge", (200, chat("score: inf")), "inf where"),
        ("reward_model", (200, "{}"), "no single score"),
        ("reward_model", (200, '[{"embedding": [1, 2]}]'), "no single score"),
        ("reward_model", (200, '[{"embedding": ["1"]}]'), "'1' where"),
    ],
)
def test_bad_replies_name_the_reward_and_what_is_wrong(kind, answer, said):
    args = JUDGE if kind == "judge" else {}
    timeout_s = 0.5 if answer[0] == 0 else 15
    with pytest.raises(RuntimeError, match=rf"^x: .*{said}"):
        ask(kind, Answers(answer), args, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("never", "no answer within 0.2 s"),
        ("raising", "KeyError: 'lost'"),
        ("rubbish", "its value is nan"),
    ],
)
def test_one_that_fails_ends_the_others_and_is_named(name, said):
    rows = {
        "slow": {"kind": "tests.rollout.test_rewards.never"},
        "bad": {"kind": f"tests.rollout.test_rewards.{name}", "timeout_s": 0.2},
    }
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"^bad: {re.escape(said)}"):
        score(rows)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (7, r"^data\.rewards\.x=7: must be a mapping"),
        ({"weight": 1}, "must be a mapping with a `kind`"),
        ({"kind": 3}, r"^data\.rewards\.x\.kind=3"),
        ({"kind": "maths"}, "must be one of"),
        ({"kind": "math", "wieght": 1}, r"x\.wieght: unknown; one of"),
        ({"kind": "math", "weight": "1"}, r"x\.weight='1': must be a number"),
        ({"kind": "math", "weight": float("inf")}, "out of range"),
        ({"kind": "math", "timeout_s": 0}, "out of range"),
        ({"kind": "math", "max_retries": 1.5}, "must be a whole number"),
        ({"kind": "math", "max_retries": -1}, "out of range"),
        ({"kind": "math", "timeout_s": 40, "max_retries": 1}, r"beyond data\.timeout_s=60"),
        ({"kind": "math", "args": {"a": 1}}, "only services take args"),
        ({"kind": "http"}, "url"),
        ({"kind": "http", "args": {"url": "http://x", "port": 1}}, "port"),
        ({"kind": "judge", "args": {"url": "u", "model": "m", "template": "?"}}, "template"),
        ({"kind": "judge", "args": {"url": "u", **JUDGE, "pattern": "("}}, "pattern"),
        ({"kind": "judge", "args": {"url": "u", **JUDGE, "pattern": "x"}}, "no group"),
        ({"kind": "tests.rollout.test_rewards.TASK"}, "async def"),
        ({"kind": "tests.rollout.test_rewards.together"}, "is data.reward by itself"),
    ],
)
def test_terms_that_cannot_be_are_refused(row, said):
    with pytest.raises(ValueError, match=said):
        make_reward(data({"x": row}))


def test_the_name_of_the_penalty_is_taken():
    with pytest.raises(ValueError, match=r"^data\.rewards\.overlong: choose another name"):
        make_reward(data({"overlong": {"kind": "math"}}))
