"""Who plays a run's episodes, as data.generate names it."""

import contextlib
import os
from asyncio import Semaphore
from collections.abc import AsyncIterator

from rollout.agents import find_generate
from rollout.agents.black_box import BlackBoxAgent
from rollout.agents.endpoint import AgentEndpoint
from rollout.agents.engine import GenerateFunction
from rollout.config import DataConfig, RolloutConfig


@contextlib.asynccontextmanager
async def player(
    data: DataConfig, rollout: RolloutConfig, token: str
) -> AsyncIterator[GenerateFunction | None]:
    """The function that plays, with the endpoint that it needs; None: environments' own turns.

    Raises:
        ValueError: data.generate or data.agent.function names none.
    """
    if data.generate == "environment":
        yield None
        return
    if data.generate != "agent":
        try:
            found = find_generate(data.generate)
        except ValueError as error:
            raise ValueError(f"data.generate={data.generate}: {error}") from error
        yield found
        return
    endpoint = AgentEndpoint(
        token=token,
        host=rollout.host,
        port=rollout.agent_port,
        max_body_bytes=rollout.max_body_bytes,
        sampling=rollout.sampling,
        override_sampling=data.agent.override_sampling,
    )
    async with endpoint:
        yield BlackBoxAgent(endpoint, data.agent)


def places(data: DataConfig) -> Semaphore | None:
    """How much of foreign code runs at a time; None: no bound."""
    count = data.max_concurrency
    if not count and data.generate == "agent" and data.agent.command:
        count = 2 * (os.cpu_count() or 1)
    return Semaphore(count) if count else None
