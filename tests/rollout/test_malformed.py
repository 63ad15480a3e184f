"""What comes from outside and is wrong, in one table: bodies, files, samples, rewards, tools,
environments, engines. Each row: the error names the offender, in time, and no group is lost."""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rollout.agents.engine import PolicyEngine
from rollout.client import EngineFailure
from rollout.config import DataConfig, SamplingConfig
from rollout.conversations import Conversations
from rollout.data import PromptStream
from rollout.domain import Domain
from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.filters import GroupFilters
from rollout.generate import Generator
from rollout.journal import read_step
from rollout.mixed_buffer import MixedBuffer
from rollout.preference_file import PreferenceFile
from rollout.producer import Producer
from rollout.rewards import REWARDS, Reward, Task
from rollout.rewards.weighted import RewardTerm, weighted
from rollout.tools import Tools, make_tool
from rollout.types import Sample, Status
from rollout.wire import encode
from tests.rollout.conftest import sorted_digits
from tests.rollout.fakes import ScriptedClient
from tests.rollout.test_client import GOOD, ask, changed, reply_with
from tests.rollout.test_wire import make_sample

LIMIT_S = 20.0
"""Of one row, on a busy machine; the bounds that are at work are below a second."""
pytestmark = pytest.mark.timeout(LIMIT_S, func_only=True)


BODIES = {
    "an empty body": ("/batch", b"", 400, "BatchRequest"),
    "no msgpack": ("/batch", b"\xc1\xc1", 400, "BatchRequest"),
    "a list for an object": ("/version", encode([1]), 400, "VersionRequest"),
    "no step": ("/batch", encode({"stepp": 0}), 400, "step"),
    "a word for a step": ("/batch", encode({"step": "zero"}), 400, "step"),
    "a step before the first": ("/batch", encode({"step": -1}), 400, "step is -1"),
    "a step after the next": ("/batch", encode({"step": 7}), 409, "step 7"),
    "a word for indices": ("/samples", encode({"step": 0, "indices": "all"}), 400, "indices"),
    "samples of no step": ("/samples", encode({"step": 0, "indices": [0]}), 409, "step 0"),
    "a version before the first": ("/version", encode({"version": -3}), 400, "version is -3"),
    "a version ahead of its step": ("/version", encode({"version": 1}), 409, "version is 1"),
    "a version without end": ("/version", encode({"version": 2**64 - 1}), 409, f"is {2**64 - 1}"),
    "a number for an object": ("/version", b"\xcf" + b"\xff" * 8, 400, "VersionRequest"),
    "a state of no step": ("/state", encode({"version": 9}), 409, "step 9"),
    "a restart at no step": ("/restore", encode({"step": 9}), 400, "step 9"),
    "a rubbish state": ("/restore", encode({"step": 0, "state": {"format": 2}}), 400, "buffer"),
    "a body too long": ("/evaluate", b"x" * 1001, 413, "1000"),
}


@pytest.mark.parametrize("row", BODIES)
def test_bodies(running, row):
    path, body, status, said = BODIES[row]
    reply = running.post(path, body)
    assert (reply.status_code, "\n" in reply.text) == (status, False)
    assert said in reply.text
    source = running.source()
    source.publish(0)
    assert [info.group_id for info in source.take(0).samples] == [0, 0, 0, 1, 1, 1]


QUESTIONS = {
    "half an object": ("{", "is no JSON object"),
    "a list": ("[1]", "is [1]"),
    "no question": ('{"answer": 1}', "has neither"),
    "two questions": ('{"question": "a", "messages": [], "answer": 1}', "has both"),
    "a number for a question": ('{"question": 4, "answer": 1}', "'question' is 4"),
    "no answer": ('{"question": "a"}', "has no 'answer'"),
    "an answer that is not a number": ('{"question": "a", "answer": NaN}', "NaN"),
    "nothing after the mark": ('{"question": "a", "answer": "#### "}', "nothing after"),
    "an unknown role": ('{"messages": [{"role": "me", "content": "a"}], "answer": 1}', "holds"),
    "bytes that are no text": ('{"question": "\xff", "answer": 1}', "utf-8"),
}
CONVERSATIONS = {
    "a conversation of nobody": ({"messages": []}, "a list of messages is wanted"),
    "a completion that is empty": ({"prompt": "q", "completion": ""}, "not empty"),
    "a conversation without an answer": (
        {"messages": [{"role": "user", "content": "x"}]},
        "messages of user",
    ),
    "no conversation at all": (7, "an object is wanted"),
}
PAIRS = {
    "a pair of one": ({"prompt": "a", "chosen": "b"}, "no 'rejected'"),
    "a pair of equals": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "two different"),
    "a pair without a prompt": ({"chosen": "b", "rejected": "c"}, "neither"),
    "a negative margin": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1},
        "margin is -1",
    ),
}


@pytest.mark.parametrize("row", QUESTIONS)
def test_questions(row, tmp_path):
    line, said = QUESTIONS[row]
    path = tmp_path / "data.jsonl"
    path.write_bytes(f'{{"question": "a", "answer": 1}}\n{line}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: ") as error:
        PromptStream(DataConfig(task="jsonl", args={"path": str(path)}), 0, "train")
    assert said in str(error.value)


@pytest.mark.parametrize("row", [*CONVERSATIONS, *PAIRS])
def test_conversations_and_pairs(row, tmp_path):
    record, said = {**CONVERSATIONS, **PAIRS}[row]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"{path}:1: ") as error:
        PreferenceFile(path, paired=True) if row in PAIRS else Conversations(
            DataConfig(path=str(path))
        )
    assert said in str(error.value)


SAMPLES = {
    "a mask too short": ({"loss_mask": np.ones(2, np.uint8)}, "loss_mask has 2 entries"),
    "log-probs too many": ({"rollout_logprobs": -np.ones(4, np.float32)}, "logprobs has 4"),
    "versions too few": ({"versions": np.ones(1, np.int32)}, "versions has 1 entries"),
    "a log-prob above 0": ({"rollout_logprobs": np.ones(3, np.float32)}, "finite and <= 0"),
    "a log-prob of nothing": (
        {"rollout_logprobs": np.full(3, -np.inf, np.float32)},
        "finite and <= 0",
    ),
    "a token of no version": ({"versions": np.full(3, -1, np.int32)}, "has no version"),
    "a reward of nothing": ({"reward": float("nan")}, "reward is nan"),
    "a reward without end": ({"reward": float("inf")}, "reward is inf"),
}


@pytest.mark.parametrize("row", SAMPLES)
def test_samples(row):
    changes, said = SAMPLES[row]
    with pytest.raises(ValueError, match=r"^sample 7/2: ") as error:
        make_sample(**changes).check()
    assert said in str(error.value)


def untyped(a) -> int:
    return a


def variadic(*values: int) -> int:
    return sum(values)


def of_a_class(sample: DataConfig) -> int:
    return 0


async def add(a: int, b: int) -> int:
    """The sum."""
    if b < 0:
        raise LookupError("no such number")
    return a + b


TOOLS: dict[str, tuple[Callable[..., Any], str]] = {
    "a parameter without a type": (untyped, "untyped, parameter a: has no type"),
    "parameters without names": (variadic, "variadic, parameter values"),
    "a parameter that JSON has not": (of_a_class, "of_a_class, parameter sample"),
}
CALLS = {
    "a call that is no JSON": ("add(1, 2)", "error: no JSON"),
    "a call of nobody": ('{"name": "divide"}', "error: a name of add"),
    "a call without arguments": ('{"name": "add"}', "required field `a`"),
    "a word for a number": ('{"name": "add", "arguments": {"a": "1", "b": 2}}', "got `str`"),
    "a call that raises": (
        '{"name": "add", "arguments": {"a": 1, "b": -2}}',
        "LookupError: no such",
    ),
}


@pytest.mark.parametrize("row", [*TOOLS, *CALLS])
def test_tools(row):
    if row in TOOLS:
        function, said = TOOLS[row]
        with pytest.raises(ValueError, match=said):
            make_tool(function)
        return
    call, said = CALLS[row]
    (told,) = asyncio.run(Tools([add]).answer(f"<tool_call>{call}</tool_call>"))
    assert told.startswith("error: ")
    assert said in told


ENGINES = {
    "words": ("nonsense", "reply is refused"),
    "no reply": ([], "0 replies to 1 prompts"),
    "two replies": ([GOOD, GOOD], "2 replies to 1 prompts"),
    "no meta_info": ([{"output_ids": [1]}], "meta_info"),
    "other log-probs": (changed(output_token_logprobs=[[-0.5, 5, None]]), "not those of the 3"),
    "a log-prob above 0 from an engine": (
        changed(output_token_logprobs=[[0.5, 5, ""], [-1, 6, ""], [-1, 2, ""]]),
        "<= 0",
    ),
    "versions with a gap": (
        changed(weight_versions=[{"version": "3", "start": 1, "end": 3}]),
        "do not cover",
    ),
    "a version that is a word": (
        changed(weight_versions=None, weight_version="default"),
        "'default', not a number",
    ),
    "an unknown end": (changed(finish_reason={"type": "banana"}), "banana"),
    "no tokens": ([GOOD | {"output_ids": []}], "0 tokens where 1 to 4"),
    "too many tokens": ([GOOD | {"output_ids": [1] * 5}], "5 tokens where 1 to 4"),
}


@pytest.mark.parametrize("row", ENGINES)
def test_engines(row):
    body, said = ENGINES[row]
    with pytest.raises(EngineFailure, match=r"http://127\.0\.0\.1:\d+") as error:
        ask(reply_with(body), max_retries=50)
    assert said in str(error.value)


class Trouble(Environment):
    """Goes wrong in one place."""

    hold_out = False

    def __init__(self, *, seed: int, where: str = "") -> None:
        self.where = where

    async def initial_messages(self) -> list[Message]:
        match self.where:
            case "a prompt that raises":
                raise RuntimeError("no prompt today")
            case "a prompt that is a number":
                return 7  # pyright: ignore[reportReturnType]
            case "a prompt that hangs":
                await asyncio.sleep(3600)
        return [{"role": "user", "content": "12"}]

    async def step(self, reply: str) -> EnvironmentStep:
        match self.where:
            case "a step that raises":
                raise KeyError("boom")
            case "a step that hangs":
                await asyncio.sleep(3600)
            case "a step that ends the process":
                sys.exit("enough")
            case "a step that is cancelled":
                raise asyncio.CancelledError
            case "a step of nothing":
                return None  # pyright: ignore[reportReturnType]
            case "a step that pays no number":
                return EnvironmentStep(reward="much")  # pyright: ignore[reportArgumentType]
            case "a step that pays nan":
                return EnvironmentStep(reward=float("nan"))
            case "a step with odd messages":
                return EnvironmentStep(messages=[{"role": 3}], done=False)  # pyright: ignore
        return EnvironmentStep(reward=1.0)

    def identity(self) -> str:
        return "trouble"

    def describe(self) -> dict[str, str]:
        if self.where == "a description that raises":
            raise LookupError("who am I")
        return {}


async def raising(sample: Sample, task: Task) -> Reward:
    raise RuntimeError("the judge is away")


async def exiting(sample: Sample, task: Task) -> Reward:
    raise SystemExit(3)


async def hanging(sample: Sample, task: Task) -> Reward:
    await asyncio.sleep(3600)
    raise AssertionError


async def of_nothing(sample: Sample, task: Task) -> Reward:
    return None  # pyright: ignore[reportReturnType]


async def of_words(sample: Sample, task: Task) -> Reward:
    return Reward(value="good")  # pyright: ignore[reportArgumentType]


async def endless(sample: Sample, task: Task) -> Reward:
    return Reward(value=float("inf"))


async def odd_component(sample: Sample, task: Task) -> Reward:
    return Reward(value=1.0, components={"style": float("nan")})


async def cancelled(sample: Sample, task: Task) -> Reward:
    raise asyncio.CancelledError


async def plays_words(engine: PolicyEngine, task: Any, sampling: SamplingConfig) -> list[Sample]:
    return ["a sample"]  # pyright: ignore[reportReturnType]


async def plays_nothing(engine: PolicyEngine, task: Any, sampling: SamplingConfig) -> list[Sample]:
    return []


async def plays_and_exits(
    engine: PolicyEngine, task: Any, sampling: SamplingConfig
) -> list[Sample]:
    sys.exit(3)


ENVIRONMENTS = {
    "a prompt that raises": "prompt: RuntimeError: no prompt today",
    "a prompt that is a number": "prompt: TypeError: 'int' object is not iterable",
    "a prompt that hangs": "prompt: no answer within 0.3 s",
    "a step that raises": "step: KeyError: 'boom'",
    "a step that hangs": "step: no answer within 0.3 s",
    "a step that ends the process": "step: SystemExit: enough",
    "a step that is cancelled": "step: CancelledError",
    "a step of nothing": "step: AttributeError",
    "a step that pays no number": "step: ValueError",
    "a step that pays nan": "reward is nan",
    "a step with odd messages": "step: ValueError: message {'role': 3}: role (system, user",
    "a description that raises": "describe: LookupError: who am I",
}
TROUBLES: dict[str, tuple[dict[str, Any], str]] = {
    "a reward that raises": ({"reward": raising}, "reward: RuntimeError: the judge is away"),
    "a reward that hangs": ({"reward": hanging}, "reward: no answer within 0.3 s"),
    "a reward that exits": (
        {"reward": weighted({"mine": (RewardTerm(kind="mine"), exiting)})},
        "reward: RewardFailedError: mine: SystemExit: 3",
    ),
    "a reward of no kind": ({"reward": of_nothing}, "reward: AttributeError"),
    "a reward of words": ({"reward": of_words}, "reward: ValueError"),
    "an infinite reward": ({"reward": endless}, "reward is inf"),
    "a component of nothing": ({"reward": odd_component}, "style is nan"),
    "a reward that is cancelled": ({"reward": cancelled}, "reward: CancelledError"),
    "a program that returns words": ({"play": plays_words}, "a str where a Sample is wanted"),
    "a program that returns nothing": ({"play": plays_nothing}, "a list of at least one Sample"),
    "a program that exits": ({"play": plays_and_exits}, "generate: SystemExit: 3"),
}


@pytest.mark.parametrize("row", [*ENVIRONMENTS, *TROUBLES])
def test_environments_rewards_and_programs(chat, tmp_path, row):
    """Their samples fail by name, in the step that they belong to; another task's go on."""
    changes, said = TROUBLES.get(row) or ({}, ENVIRONMENTS[row])
    args = {"where": row} if row in ENVIRONMENTS else {}
    data = DataConfig(task=f"{__name__}.Trouble", args=args)

    def domain(name: str, data: DataConfig, **changes: Any) -> Domain:
        values: dict[str, Any] = {"reward": REWARDS["environment"], **changes}
        return Domain(
            name=name,
            prompts=PromptStream(data, 0, "train"),
            generator=Generator(
                client=ScriptedClient(chat, sorted_digits),  # pyright: ignore[reportArgumentType]
                chat=chat,
                sampling=SamplingConfig(),
                timeout_s=0.3,
                episode_timeout_s=0.3,
                **values,
            ),
            filters=GroupFilters([]),
            samples_per_prompt=2,
            seed=0,
            max_running_groups=4,
        )

    async def scenario() -> list[Sample]:
        producer = Producer(
            buffer=MixedBuffer(
                groups_per_step=2, max_staleness_steps=0, weights={"good": 1, "bad": 1}
            ),
            domains=[domain("good", DataConfig()), domain("bad", data, **changes)],
            rollouts=tmp_path,
        )
        producer.publish(0)
        delivered = await producer.batch(0, LIMIT_S / 2)
        assert delivered is not None, "the step waits for a lost group"
        assert (producer.failure, producer.buffer.num_running) == (None, 0)
        return delivered[1]

    samples = asyncio.run(scenario())
    assert [sample.group_id for sample in samples] == [0, 0, 1, 1]
    _, journaled = read_step(next(tmp_path.glob("step_*")))
    assert [sample.status for sample in journaled] == [sample.status for sample in samples]
    assert [sample.reward for sample in samples[:2]] == [1.0, 1.0]
    for sample in samples[2:]:
        assert sample.status is Status.FAILED
        assert said in sample.metadata["error"]
        assert not sample.loss_mask.any()


def test_the_table_has_at_least_sixty_rows():
    tables: list[dict[str, Any]] = [BODIES, QUESTIONS, CONVERSATIONS, PAIRS, SAMPLES, TOOLS, CALLS]
    tables += [ENGINES, ENVIRONMENTS, TROUBLES]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) >= 60
