"""Episodes that a real engine plays, for tests of what their samples hold."""

import asyncio
from collections.abc import Sequence

from rollout.client import EngineClient
from rollout.config import EngineConfig, SamplingConfig
from rollout.environments.base import Environment
from rollout.generate import Episode, Generator
from rollout.rewards import REWARDS
from rollout.tokens import Chat
from rollout.types import Sample
from tests.conftest import API_KEY


def play(
    url: str,
    chat: Chat,
    environments: Sequence[Environment],
    *,
    max_new_tokens: int,
    timeout_s: float,
) -> list[Sample]:
    """The samples of one group, an episode of each environment."""

    async def main() -> list[Sample]:
        async with EngineClient([url], API_KEY, EngineConfig()) as client:
            generator = Generator(
                client=client,
                chat=chat,
                sampling=SamplingConfig(max_new_tokens=max_new_tokens),
                reward=REWARDS["environment"],
                timeout_s=timeout_s,
            )
            episodes = [
                Episode(environment=environment, group_id=0, index=k, seed=k)
                for k, environment in enumerate(environments)
            ]
            return await generator.run(episodes, 0)

    return asyncio.run(main())
