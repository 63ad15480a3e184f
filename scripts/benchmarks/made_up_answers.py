"""A task and answers without an engine, for scripts/benchmarks/buffer.py."""

from rollout.agents import AgentTask, PolicyEngine
from rollout.config import SamplingConfig
from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.tokens import Transcript
from rollout.types import Sample


class NothingEnvironment(Environment):
    """Asks nothing."""

    hold_out = False

    def __init__(self, *, seed: int) -> None:
        pass

    async def initial_messages(self) -> list[Message]:
        """A word."""
        return [{"role": "user", "content": "1"}]

    async def step(self, reply: str) -> EnvironmentStep:
        """The end."""
        return EnvironmentStep()

    def identity(self) -> str:
        """Always the same."""
        return ""


async def answer(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig) -> list[Sample]:
    """As many tokens as a response may have, of version 0."""
    count = sampling.max_new_tokens
    transcript = Transcript([1] * 16)
    transcript.add_reply([2 + task.index % 8] * count, [-1.0] * count, [0] * count)
    return [task.sample(transcript, reward=float(task.group_id % 2))]
