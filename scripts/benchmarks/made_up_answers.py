"""Answers without an engine: a data.generate for scripts/benchmarks/buffer.py."""

from rollout.agents import AgentTask, PolicyEngine
from rollout.config import SamplingConfig
from rollout.tokens import Transcript
from rollout.types import Sample


async def answer(engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig) -> list[Sample]:
    """As many tokens as a response may have, of version 0."""
    count = sampling.max_new_tokens
    transcript = Transcript([1] * 16)
    transcript.add_reply([2 + task.index % 8] * count, [-1.0] * count, [0] * count)
    return [task.sample(transcript, reward=float(task.group_id % 2))]
