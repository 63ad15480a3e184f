"""The calculator with an MCP server's tool: a real policy, a real server, and what is trained."""

import asyncio

from rollout.client import EngineClient
from rollout.config import EngineConfig, SamplingConfig
from rollout.environments.arithmetic import evaluate
from rollout.generate import Episode, Generator
from rollout.rewards import REWARDS
from rollout.tokens import Chat
from rollout.types import Sample, Status
from tests.conftest import API_KEY
from tests.rollout.mcp_calculator import EveryReplyCalls


def play(url: str, chat: Chat) -> list[Sample]:
    """Of an untrained policy, which ends its replies by chance, most of them early."""

    async def main() -> list[Sample]:
        async with EngineClient([url], API_KEY, EngineConfig()) as client:
            generator = Generator(
                client=client,
                chat=chat,
                sampling=SamplingConfig(max_new_tokens=120),
                reward=REWARDS["environment"],
                timeout_s=30.0,
            )
            episodes = [
                Episode(environment=environment, group_id=0, index=k, seed=k)
                for k, environment in enumerate(
                    EveryReplyCalls(seed=0, max_calls=1) for _ in "x" * 48
                )
            ]
            return await generator.run(episodes, 0)

    return asyncio.run(main())


def test_what_the_server_says_is_what_the_policy_is_told_and_not_trained_on(engine, chat):
    samples = play(engine.url, chat)
    assert not [sample.metadata for sample in samples if sample.status is Status.FAILED]
    told = 0
    for sample in (each for each in samples if len(each.turn_starts) > 1):
        told += 1
        response, second = sample.tokens[sample.prompt_length :].tolist(), sample.turn_starts[1]
        end = response.index(chat.end_id)
        said = chat.text(response[:end])
        try:
            result = str(evaluate(said))
        except ValueError:
            result = "error"
        assert chat.text(response[end + 1 : second]).startswith(f"={result}|"), said
        assert sample.loss_mask[: end + 1].all()
        assert not sample.loss_mask[end + 1 : second].any()
    assert told > 5, "an untrained policy ends some of its replies by chance"
