"""Black-box agents at the OpenAI-compatible endpoint, with OpenAI's own client."""

import asyncio
import copy
import dataclasses
import string
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from openai import AsyncOpenAI

from framework import tiny_model
from rollout.agents import AgentTask, PolicyEngine
from rollout.agents.black_box import AgentCall, BlackBoxAgent
from rollout.agents.endpoint import AgentEndpoint
from rollout.agents.session import Session
from rollout.client import EngineClient, Generation
from rollout.config import AgentConfig, EngineConfig, SamplingConfig
from rollout.environments.calculator import CalculatorEnvironment
from rollout.generate import Episode, Generator
from rollout.prompt_bound import PromptBound
from rollout.rewards import REWARDS
from rollout.tokens import Chat
from rollout.types import Sample, Status
from tests.conftest import API_KEY
from tests.rollout.agent_client import solve
from tests.rollout.fakes import EchoEnvironment, ScriptedClient

TOKEN = "the-run"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NAMELESS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "tool_calls": [{"function": {"name": 7, "arguments": "{}"}}]},
    {"role": "tool", "content": "5"},
]
SCRIPT = str(Path(__file__).with_name("agent_client.py"))


@dataclass
class Talk:
    endpoint: AgentEndpoint
    session: Session
    client: AsyncOpenAI
    task: AgentTask
    scripted: ScriptedClient

    async def say(self, *messages: Any, **named: Any) -> Any:
        return await self.client.chat.completions.create(
            model="policy",
            messages=[
                {"role": "user", "content": m} if isinstance(m, str) else m for m in messages
            ],
            **named,
        )

    def samples(self, chat: Chat) -> list[str]:
        return [chat.text(sample.tokens) for sample in self.session.samples(0.0)]


def new_endpoint() -> AgentEndpoint:
    return AgentEndpoint(
        token=TOKEN,
        host="127.0.0.1",
        port=0,
        max_body_bytes=5000,
        sampling=SamplingConfig(),
        override_sampling=False,
    )


def converse(
    chat: Chat,
    work: Callable[[Talk], Awaitable[None]],
    answer: Callable[[str], str] = lambda text: text[-2:],
    max_new_tokens: int = 60,
    prompts: PromptBound | None = None,
) -> None:
    async def main() -> None:
        scripted = ScriptedClient(chat, answer)
        engine = PolicyEngine(scripted, chat, episode_seed=7, version=0, prompts=prompts)
        task = AgentTask(environment=EchoEnvironment(seed=0), group_id=3, index=1, seed=7)
        async with new_endpoint() as endpoint:
            sampling = SamplingConfig(max_new_tokens=max_new_tokens)
            session = endpoint.open(engine, task, sampling)
            base_url, key = endpoint.base_url(session), endpoint.key(session)
            async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
                await work(Talk(endpoint, session, client, task, scripted))

    asyncio.run(main())


def assistant(reply: Any) -> dict[str, Any]:
    return reply.choices[0].message.model_dump()


def test_a_conversation_goes_on_in_its_own_tokens_and_a_changed_one_starts_anew(chat):
    async def work(talk: Talk) -> None:
        first = await talk.say("q1", logprobs=True)
        assert first.choices[0].message.content == "q1"
        assert first.choices[0].finish_reason == "stop"
        assert [each.token for each in first.choices[0].logprobs.content] == ["q", "1", "<eos>"]
        assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (3, 3)
        await talk.say("q1", assistant(first), "q2")
        assert talk.samples(chat) == ["<bos>q1q1<eos>q2q2<eos>"]
        await talk.say("q1", {"role": "assistant", "content": "edited"}, "q3")
        assert talk.samples(chat)[1] == "<bos>q1edited<eos>q3q3<eos>"
        first, second = talk.session.samples(0.5)
        assert first.loss_mask.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
        assert first.turn_starts.tolist() == [0, 5]
        assert second.loss_mask.tolist() == [1, 1, 1]  # what was edited is prompt
        assert first.metadata["segment"] == "1 of 2"
        assert second.reward == 0.5

    converse(chat, work)


def test_what_is_sent_back_need_not_tokenise_alike(chat):
    """The policy wrote a character that the tokenizer would not: its own id stays in place."""

    async def work(talk: Talk) -> None:
        def odd(prompt: list[int], budget: int) -> Generation:
            return Generation(
                token_ids=np.array([7, 0, chat.end_id], dtype=np.int32),
                logprobs=np.full(3, -1.0, dtype=np.float32),
                versions=np.array([4, 4, 5], dtype=np.int32),
                finish="stop",
                end_token=True,
            )

        talk.scripted._generation = odd  # type: ignore[method-assign]
        first = await talk.say("q1")
        assert first.choices[0].message.content == chat.text([7, 0])
        await talk.say("q1", assistant(first), "q2")
        (sample,) = talk.session.samples(0.0)
        response = sample.tokens[sample.prompt_length :].tolist()
        assert response == [7, 0, chat.end_id, *chat.tokens("q2"), 7, 0, chat.end_id]
        assert sample.versions.tolist() == [4, 4, 5, -1, -1, 4, 4, 5]
        assert sample.rollout_logprobs.tolist() == [-1, -1, -1, 0, 0, -1, -1, -1]

    converse(chat, work)


@pytest.fixture
def wide_chat(monkeypatch) -> Chat:
    """With a tokenizer that can write JSON."""
    monkeypatch.setattr(tiny_model, "CHARACTERS", string.printable)
    return Chat(tiny_model._tokenizer())


def test_tools_and_streams(wide_chat):
    chat = wide_chat

    async def work(talk: Talk) -> None:
        reply = await talk.say("q1", tools=[ADD])
        (call,) = reply.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
        assert reply.choices[0].finish_reason == "tool_calls"
        told = {"role": "tool", "content": "5", "tool_call_id": call.id}
        stream = await talk.say("q1", assistant(reply), told, tools=[ADD], stream=True)
        deltas = [chunk.choices[0] async for chunk in stream]
        assert deltas[1].delta.tool_calls[0].function.name == "add"
        assert deltas[-1].finish_reason == "tool_calls"
        (text,) = talk.samples(chat)
        assert text.endswith(f"q1{CALL}<eos>5{CALL}<eos>")
        plain = await talk.say("q9", stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in plain]
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said == CALL  # without tools a call is text
        assert chunks[-1].usage.completion_tokens == len(chat.tokens(CALL)) + 1

    converse(wide_chat, work, lambda text: CALL, max_new_tokens=300)


def test_a_template_that_refuses_a_later_message_is_the_requests_fault(chat):
    """And the conversation goes on where the request is right."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system comes first') }}{% endif %}{% endfor %}"
    ) + tokenizer.chat_template
    strict = Chat(tokenizer)

    async def work(talk: Talk) -> None:
        first = assistant(await talk.say("q1"))
        with pytest.raises(openai.BadRequestError, match=r"template refuses .*system comes first"):
            await talk.say("q1", first, {"role": "system", "content": "q2"})
        await talk.say("q1", first, "q3")
        assert talk.samples(strict) == ["<bos>q1q1<eos>q3q3<eos>"]

    converse(strict, work)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"temperature": 0.2}, "temperature is 0.2, the run samples with rollout.sampling.temper"),
        ({"n": 3}, "n is 3"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"tool_choice": "required", "tools": [ADD]}, "tool_choice is"),
        ({"extra_body": {"beam_width": 4}}, "beam_width: this endpoint knows no such field"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "role is 'wizard'"),
        ({"messages": [{"role": "user", "content": 7}]}, "content: a text is wanted"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the assistant's own"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": NAMELESS}, "messages.1..tool_calls: .*name is 7"),
    ],
)
def test_what_training_does_not_permit_is_refused_by_name(chat, named, said):
    async def work(talk: Talk) -> None:
        request = {"messages": [{"role": "user", "content": "q1"}], **named}
        with pytest.raises(openai.BadRequestError, match=said):
            await talk.client.chat.completions.create(model="policy", **request)
        assert talk.session.samples(0.0) == []

    converse(chat, work)


def test_keys_open_their_own_session_only_and_bodies_are_bounded(chat):
    async def work(talk: Talk) -> None:
        url = talk.endpoint.base_url(talk.session)
        other = talk.endpoint.open(
            PolicyEngine(talk.scripted, chat, episode_seed=1, version=0),
            talk.task,
            SamplingConfig(),
        )
        async with httpx.AsyncClient(trust_env=False) as http:

            async def status(key: str, **named: Any) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                path = named.pop("path", "/reward")
                return (await http.post(url + path, headers=headers, **named)).status_code

            assert await status("wrong", json={"reward": 1}) == 401
            assert await status(talk.endpoint.key(other), json={"reward": 1}) == 401
            own = talk.endpoint.key(talk.session)
            assert await status(own, json={"reward": "much"}) == 400
            assert await status(own, content=b"[" * 4000) == 400
            assert await status(own, content=b"x" * 6000) == 413
            assert await status(own, path="/chat/completions", content=b"\xff") == 400
            assert await status(TOKEN, json={"reward": 0.25}) == 200
            assert talk.session.reported == 0.25
            talk.endpoint.close(talk.session)
            assert await status(own, json={"reward": 1}) == 404

    converse(chat, work)


def test_a_repeated_request_gets_the_answer_it_missed(chat):
    async def work(talk: Talk) -> None:
        again = {"x-stainless-retry-count": "1"}
        await asyncio.gather(talk.say("q1"), talk.say("q1", extra_headers=again))
        await talk.say("q1", extra_headers=again)
        assert len(talk.scripted.calls) in (1, 2)  # the two at once may arrive in either order
        before = len(talk.scripted.calls)
        await talk.say("q1")  # asked anew: a second sample of the same prompt
        assert len(talk.scripted.calls) == before + 1
        assert len({seed for call in talk.scripted.calls for seed in call}) == before + 1

    converse(chat, work)


def test_a_spent_budget_says_so(chat):
    async def work(talk: Talk) -> None:
        reply = await talk.say("q1")
        assert reply.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError) as caught:
            await talk.say("q1", assistant(reply), "q2")
        assert caught.value.code == "context_length_exceeded"
        (sample,) = talk.session.samples(0.0)
        assert (sample.status, sample.response_length) == (Status.TRUNCATED, 60)

    converse(chat, work, lambda text: "7" * 100)


def test_a_conversation_that_begins_too_long_is_refused_before_it_is_sampled_from(chat):
    async def work(talk: Talk) -> None:
        with pytest.raises(openai.BadRequestError, match="a prompt of 12 tokens, more than") as why:
            await talk.say("q" + "7" * 10)
        assert why.value.code == "context_length_exceeded"
        assert not talk.scripted.calls
        await talk.say("q" + "7" * 9)
        assert len(talk.session.samples(0.0)) == 1

    bound = PromptBound(max_tokens=11, reason="more than 11")
    converse(chat, work, prompts=bound)


async def lazy(call: AgentCall) -> None:
    """Does nothing."""


def judge(call: AgentCall) -> float:
    """No coroutine: in a thread, with the synchronous client, and it tells the reward itself."""
    with openai.OpenAI(base_url=call.base_url, api_key=call.api_key) as client:
        client.chat.completions.create(model="policy", messages=call.messages)  # type: ignore
    return 0.75


def play(client: Any, chat: Chat, config: AgentConfig, **changes: Any) -> list[Sample]:
    async def main() -> list[Sample]:
        async with new_endpoint() as endpoint:
            generator = Generator(
                client=client,
                chat=chat,
                sampling=SamplingConfig(max_new_tokens=40),
                reward=REWARDS["environment"],
                timeout_s=5.0,
                play=BlackBoxAgent(endpoint, config),
                episode_timeout_s=changes.get("episode_timeout_s", 60.0),
                places=asyncio.Semaphore(2),
            )
            episodes = [
                Episode(
                    environment=CalculatorEnvironment(seed=5), group_id=3, index=k, seed=100 + k
                )
                for k in range(changes.get("count", 1))
            ]
            return await generator.run(episodes, 0)

    return asyncio.run(main())


def calculates(text: str) -> str:
    """A policy that has learnt the task."""
    asked, _, rest = text.removeprefix("<bos>").partition("?")
    return f":{rest.split('=')[1].rstrip('|')}" if rest else f"[{asked}]"


def test_commands_and_functions_play_the_calculator_task(chat):
    for config in (
        AgentConfig(command=[sys.executable, SCRIPT]),
        AgentConfig(function="tests.rollout.agent_client.solve"),
    ):
        (sample,) = play(ScriptedClient(chat, calculates), chat, config)
        assert sample.metadata.get("error") is None
        assert (sample.status, sample.reward) == (Status.STOPPED, 1.0)
        assert len(sample.turn_starts) == 2
        assert sample.metadata["answer"] in chat.text(sample.tokens)
    (sample,) = play(
        ScriptedClient(chat, calculates),
        chat,
        AgentConfig(function="tests.rollout.test_endpoint.judge"),
    )
    assert sample.reward == 0.75


def test_agents_that_fail_cost_their_episode_and_leave_nothing_behind(chat, tmp_path):
    pid_file = tmp_path / "pid"
    shell = f"sleep 600 & echo $! > {pid_file}; wait"
    for config, said in (
        (AgentConfig(command=["sh", "-c", "echo oh no; exit 3"]), "status 3: oh no"),
        (AgentConfig(command=["true"]), "without asking the policy"),
        (AgentConfig(function="tests.rollout.test_endpoint.lazy"), "without asking the policy"),
        (AgentConfig(command=["sh", "-c", shell]), "no answer within 1 s"),
    ):
        (sample,) = play(ScriptedClient(chat, calculates), chat, config, episode_timeout_s=1.0)
        assert sample.status is Status.FAILED
        assert said in sample.metadata["error"]
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_daemon_that_holds_the_output_open_does_not_hold_the_episode(chat, tmp_path):
    pid_file = tmp_path / "pid"
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        f"while not os.path.exists({str(pid_file)!r}): time.sleep(0.01)\n"
    )
    start = time.monotonic()
    config = AgentConfig(command=[sys.executable, "-c", daemon])
    (sample,) = play(ScriptedClient(chat, calculates), chat, config, episode_timeout_s=100.0)
    assert time.monotonic() - start < 50
    assert "without asking the policy" in sample.metadata["error"]
    if psutil.pid_exists(pid := int(pid_file.read_text())):
        psutil.Process(pid).kill()


def test_the_environment_judges_what_the_policy_said_and_not_an_example(chat):
    """The agent's prompt holds a worked example, whose answer is not the policy's."""
    (sample,) = play(
        ScriptedClient(chat, lambda text: calculates(text.rpartition(f"{EXAMPLE_ENDS}<eos>")[2])),
        chat,
        AgentConfig(function="tests.rollout.test_endpoint.with_example"),
    )
    assert (sample.status, sample.reward) == (Status.STOPPED, 1.0)


EXAMPLE_ENDS = ":000"


async def with_example(call: AgentCall) -> None:
    """As `solve`, after an example."""
    example = [
        {"role": "user", "content": "1*1+1"},
        {"role": "assistant", "content": EXAMPLE_ENDS},
    ]
    await solve(dataclasses.replace(call, messages=[*example, *call.messages]))


class Recording(EngineClient):
    """Keeps what the engine sampled."""

    sampled: list[Generation]

    async def generate(self, prompts, sampling, seeds, **named):
        found = await super().generate(prompts, sampling, seeds)
        self.sampled += found
        return found


def test_what_a_real_engine_sampled_is_what_is_recorded(engine, chat):
    client = Recording([engine.url], API_KEY, EngineConfig())
    client.sampled = []

    async def main() -> list[Sample]:
        async with client, new_endpoint() as endpoint:
            generator = Generator(
                client=client,
                chat=chat,
                sampling=SamplingConfig(max_new_tokens=30),
                reward=REWARDS["environment"],
                timeout_s=5.0,
                play=BlackBoxAgent(
                    endpoint, AgentConfig(function="tests.rollout.test_endpoint.chatty")
                ),
            )
            episodes = [
                Episode(environment=EchoEnvironment(seed=0), group_id=0, index=k, seed=k)
                for k in range(4)
            ]
            return await generator.run(episodes, 0)

    samples = asyncio.run(main())
    assert {sample.status for sample in samples} <= {Status.STOPPED, Status.TRUNCATED}
    turns = set()
    for sample in samples:
        written = np.flatnonzero(sample.loss_mask)
        runs = np.split(written, np.flatnonzero(np.diff(written) > 1) + 1)
        response = sample.tokens[sample.prompt_length :]
        turns |= {
            (tuple(response[run].tolist()), tuple(sample.rollout_logprobs[run].tolist()))
            for run in runs
        }
    assert turns == {
        (tuple(g.token_ids.tolist()), tuple(g.logprobs.tolist())) for g in client.sampled
    }


async def chatty(call: AgentCall) -> float:
    """Two turns, the first cut short by the agent, whatever the policy says."""
    async with AsyncOpenAI(base_url=call.base_url, api_key=call.api_key) as client:
        messages: list[Any] = list(call.messages)
        for question in ("q1", "q2"):
            reply = await client.chat.completions.create(
                model="policy", messages=messages, max_tokens=8
            )
            messages += [assistant(reply), {"role": "user", "content": question}]
    return 1.0
