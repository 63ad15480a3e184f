"""Where prompts come from: streams whose k-th prompt is a pure function of (seed, split, k).

Prompts for training and for evaluation are disjoint by content, not by luck: an eighth of all
prompts, chosen by a hash of their identity, is set aside for evaluation.
"""

import asyncio
import hashlib
import inspect
from typing import Any, Literal

from rollout.config import DataConfig
from rollout.environments import Environment, find_environment
from rollout.seeds import derive_seed
from rollout.tokens import Chat, Transcript
from rollout.types import Sample

Split = Literal["train", "sft", "preference", "eval"]

EVAL_SHARE = 8
"""One in this many prompts belongs to evaluation."""
_MAX_DRAWS = 50 * EVAL_SHARE


class PromptStream:
    """The prompts of one split, in order, from any position."""

    def __init__(self, data: DataConfig, seed: int, split: Split) -> None:
        try:
            self._kind = find_environment(data.task)
        except ValueError as error:
            raise ValueError(f"data.task={data.task}: {error}") from error
        self._data = data
        self._seed = seed
        self._split = split
        self.position = 0
        """Index of the next prompt."""

    def next(self) -> int:
        """Index of the next prompt; `environments` makes its episodes."""
        index = self.position
        self.position += 1
        return index

    def environments(self, index: int, count: int) -> list[Environment]:
        """`count` episodes of prompt `index`, all with the same initial state."""
        seed = self._prompt_seed(index)
        return [self._make(seed) for _ in range(count)]

    def state_dict(self) -> dict[str, int]:
        """The cursor."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a state_dict was taken."""
        self.position = state["position"]

    def _make(self, seed: int) -> Environment:
        try:
            return self._kind(seed=seed, **self._data.args)
        except TypeError as error:
            args, task = self._data.args, self._data.task
            known = [name for name in inspect.signature(self._kind).parameters if name != "seed"]
            raise ValueError(
                f"data.args={args} of data.task={task}: {error}; it takes {', '.join(known)}"
            ) from error

    def _prompt_seed(self, index: int) -> int:
        """Seed of the first draw for this index that falls into this split."""
        for draw in range(_MAX_DRAWS):
            seed = derive_seed(self._seed, self._split, index, draw, bits=31)
            environment = self._make(seed)
            if not environment.hold_out:
                return seed
            digest = hashlib.blake2b(environment.identity().encode(), digest_size=8).digest()
            for_eval = int.from_bytes(digest, "little") % EVAL_SHARE == 0
            if for_eval == (self._split == "eval"):
                return seed
        raise ValueError(
            f"data.task={self._data.task} has too few different prompts to set some aside for "
            f"{self._split}: widen data.args, or declare hold_out = False in its class"
        )


def demonstrations(
    data: DataConfig, tokenizer: Any, seed: int, start: int, count: int
) -> list[Sample]:
    """Supervised samples of prompts start .. start + count - 1 of the `sft` split.

    Tokens by the chat template, the loss mask on every reply and its end token; log-probs 0,
    versions 0 where the mask is 1. Not to be called from a running event loop.
    """
    chat = Chat(tokenizer)
    stream = PromptStream(data, seed, "sft")

    async def render() -> list[Sample]:
        return [await _demonstration(chat, stream, k) for k in range(start, start + count)]

    return asyncio.run(render())


async def _demonstration(chat: Chat, stream: PromptStream, index: int) -> Sample:
    (environment,) = stream.environments(index, 1)
    return await play(chat, environment, environment.demonstration(), group_id=index, index=0)


async def play(
    chat: Chat, environment: Environment, replies: list[str], *, group_id: int, index: int
) -> Sample:
    """The episode in which the policy gives these replies, one a turn; log-probs and versions 0."""
    transcript = Transcript(chat.prompt(await environment.initial_messages()))
    reward = 0.0
    for reply in replies:
        tokens = [*chat.tokens(reply), chat.end_id]
        transcript.add_reply(tokens, logprobs=[0.0] * len(tokens), versions=[0] * len(tokens))
        step = await environment.step(reply)
        reward += step.reward
        if step.done:
            break
        transcript.add_observation(chat.continuation(step.messages, ended=True))
    return transcript.sample(
        group_id=group_id, index=index, reward=reward, metadata=environment.describe()
    )
