"""data.generate=agent: a program that knows nothing of us plays the episode over the endpoint.

Either a command, one process an episode, or a Python function of the user's own. The episode ends
when it exits with 0, or returns. Its reward is what it told the endpoint (or returned), else what
the environment says to the recorded replies, one after another; data.reward goes on from there.
"""

import asyncio
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from rollout.agents.endpoint import AgentEndpoint, closing, task_message
from rollout.agents.engine import AgentTask, PolicyEngine
from rollout.agents.session import Session
from rollout.config import AgentConfig, SamplingConfig
from rollout.environments import Environment
from rollout.own_code import import_own
from rollout.process import die_with_parent, kill_tree
from rollout.threads import in_thread
from rollout.types import Sample

_TAIL_BYTES = 2000


class AgentFailure(RuntimeError):
    """The agent ended with an error, or did nothing; the message is one line."""


@dataclass(kw_only=True, slots=True, frozen=True)
class AgentCall:
    """What a function that is an agent gets."""

    base_url: str
    api_key: str
    """Both for any OpenAI client; the model's name is `policy`."""
    messages: list[dict[str, Any]]
    """The task's prompt."""
    environment: Environment
    """Of this episode alone."""


AgentFunction = Callable[[AgentCall], Any]
"""Returns (or is a coroutine of) the reward, or None: then the environment judges the replies."""


def find_agent(name: str) -> AgentFunction:
    """A function of the user's own: package.module.function.

    Raises:
        ValueError: there is none such, or it does not take one argument; one line.
    """
    if "." not in name:
        raise ValueError("package.module.function is wanted")
    found = import_own(name)
    if not callable(found):
        raise ValueError("is no function")
    try:
        inspect.signature(found).bind("call")
    except TypeError as error:
        raise ValueError(f"must take one argument, an AgentCall: {error}") from None
    return found


class BlackBoxAgent:
    """A GenerateFunction."""

    def __init__(self, endpoint: AgentEndpoint, config: AgentConfig) -> None:
        self._endpoint = endpoint
        self._command = config.command
        self._function = find_agent(config.function) if config.function else None

    async def __call__(
        self, engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig
    ) -> list[Sample]:
        """One episode; AgentFailure where it cannot be trained on."""
        with closing(self._endpoint, self._endpoint.open(engine, task, sampling)) as session:
            await task.initial_messages()
            try:
                if self._function is not None:
                    await self._call(self._function, session)
                else:
                    await self._execute(session)
            except Exception:
                # An agent that runs out of tokens may well fail of it: that is a truncated answer.
                if not session.context_spent:
                    raise
            reward = session.reported
            if reward is None:
                reward = await environment_reward(task.environment, session.replies())
            samples = session.samples(reward)
        if not samples:
            raise AgentFailure("the agent ended without asking the policy for anything")
        return samples

    async def _call(self, function: AgentFunction, session: Session) -> None:
        call = AgentCall(
            base_url=self._endpoint.base_url(session),
            api_key=self._endpoint.key(session),
            messages=(await task_message(session.task))["messages"],
            environment=session.task.environment,
        )
        if inspect.iscoroutinefunction(function):
            told = await function(call)
        else:
            told = await in_thread(function, call)
        if told is not None:
            session.reported = float(told)

    async def _execute(self, session: Session) -> None:
        """One process: the task as JSON on its stdin, address and key in its environment."""
        # A file and no pipe: a daemon that it leaves behind would hold a pipe open.
        with tempfile.TemporaryFile() as output:
            status = await self._run(session, output)
            if status:
                output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL_BYTES))
                said = output.read().decode(errors="replace").strip()
                last = (said.splitlines() or ["it said nothing"])[-1]
                raise AgentFailure(f"the agent ended with status {status}: {last[-300:]}")

    async def _run(self, session: Session, output: IO[bytes]) -> int:
        """Its exit status; nothing of its process tree is left."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **os.environ,
                "OPENAI_BASE_URL": self._endpoint.base_url(session),
                "OPENAI_API_KEY": self._endpoint.key(session),
                "DRIVETRAIN_SESSION": session.id,
            },
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(await task_message(session.task)).encode())
            process.stdin.close()
            return await process.wait()
        finally:
            kill_tree(process.pid)  # whatever it started, and itself where time ran out
            await process.wait()


async def environment_reward(environment: Environment, replies: list[str]) -> float:
    """What the environment gives for these replies, one a turn, until it is done."""
    reward = 0.0
    for reply in replies:
        step = await environment.step(reply)
        reward += float(step.reward)
        if step.done:
            break
    return reward
