"""Where prompts come from: streams whose k-th prompt is a pure function of (seed, split, k).

Prompts for training and for evaluation are disjoint by content, not by luck: an eighth of all
prompts, chosen by a hash of their identity, is set aside for evaluation.
"""

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from rollout.boundary import close_environment
from rollout.config import DataConfig, RolloutConfig
from rollout.environments import Environment, find_environment
from rollout.mixture import domain_seed, read_domains
from rollout.seeds import HELD_OUT_SHARE, derive_seed, held_out
from rollout.shares import turns, whole_parts
from rollout.tokens import Chat, Transcript
from rollout.types import Sample

T = TypeVar("T")
Split = Literal["train", "sft", "preference", "eval"]

_MAX_DRAWS = 50 * HELD_OUT_SHARE


class PromptStream:
    """The prompts of one split, in order, from any position."""

    def __init__(self, data: DataConfig, seed: int, split: Split) -> None:
        try:
            self._kind = find_environment(data.task)
        except ValueError as error:
            raise ValueError(f"data.task={data.task}: {error}") from error
        _check_types(self._kind, data)
        self._data = data
        self._seed = seed
        self._split = split
        self._finite = self._call(self._kind.finite, split)
        """Seeds of all prompts, where they are finitely many."""
        self._epoch: tuple[int, list[int]] = (-1, [])

    @property
    def num_prompts(self) -> int:
        """Of a task that has only so many; 0: it has no end."""
        return len(self._finite or [])

    @property
    def timeout_s(self) -> float:
        """Bound of one step of an environment."""
        return self._data.timeout_s

    def environments(self, index: int, count: int) -> list[Environment]:
        """`count` episodes of prompt `index`, all with the same initial state."""
        seed = self._prompt_seed(index)
        return [self._make(seed) for _ in range(count)]

    def _make(self, seed: int) -> Environment:
        return self._call(self._kind, seed=seed)

    def _call(self, made: Callable[..., T], *given: Any, **named: Any) -> T:
        try:
            return made(*given, **named, **self._data.args)
        except TypeError as error:
            args, task = _shown(self._data.args), self._data.task
            known = inspect.signature(self._kind).parameters
            wanted = ", ".join(str(each) for name, each in known.items() if name != "seed")
            raise ValueError(
                f"data.args={args} of data.task={task}: {error}; it takes {wanted}"
            ) from error

    def _prompt_seed(self, index: int) -> int:
        """Seed of the first draw for this index that falls into this split; of a finite set, the
        next in this epoch's order."""
        if self._finite:
            return self._in_epoch(*divmod(index, len(self._finite)))
        for draw in range(0 if self._finite == [] else _MAX_DRAWS):
            seed = derive_seed(self._seed, self._split, index, draw, bits=31)
            environment = self._make(seed)
            wanted = not environment.hold_out or (
                held_out(environment.identity()) == (self._split == "eval")
            )
            close_environment(environment)
            if wanted:
                return seed
        raise ValueError(
            f"data.task={self._data.task} has too few different prompts to set some aside for "
            f"{self._split}: widen data.args, or declare hold_out = False in its class"
        )

    def _in_epoch(self, epoch: int, place: int) -> int:
        """Every epoch has an order of its own, a function of its number alone."""
        assert self._finite is not None
        if self._epoch[0] != epoch:
            order = list(self._finite)
            random.Random(derive_seed(self._seed, self._split, "epoch", epoch)).shuffle(order)
            self._epoch = epoch, order
        return self._epoch[1][place]


def demonstrations(
    data: DataConfig, tokenizer: Any, seed: int, start: int, count: int
) -> list[Sample]:
    """Supervised samples start .. start + count - 1 of the `sft` split; of a mixture in its ratio.

    Tokens by the chat template, the loss mask on every reply and its end token; log-probs 0,
    versions 0 where the mask is 1. Not to be called from a running event loop.
    """
    chat = Chat(tokenizer)
    domains = read_domains(data, RolloutConfig())
    streams = {
        name: PromptStream(each.data, domain_seed(seed, name), "sft")
        for name, each in domains.items()
    }
    parts = whole_parts({name: each.weight for name, each in domains.items()})
    drawn = turns(parts, start, count)

    async def render() -> list[Sample]:
        return [
            await _demonstration(chat, streams[name], index, start + k)
            for k, (name, index) in enumerate(drawn)
        ]

    return asyncio.run(render())


async def _demonstration(chat: Chat, stream: PromptStream, prompt: int, place: int) -> Sample:
    (environment,) = stream.environments(prompt, 1)
    replies = environment.demonstration()
    return await play(chat, environment, replies, stream.timeout_s, group_id=place, index=0)


async def play(
    chat: Chat,
    environment: Environment,
    replies: list[str],
    timeout_s: float,
    *,
    group_id: int,
    index: int,
) -> Sample:
    """The episode in which the policy gives these replies, one a turn; log-probs and versions 0.

    ValueError: the environment did not answer one within timeout_s.
    """

    async def within(call: Awaitable[T]) -> T:
        async with asyncio.timeout(timeout_s):
            return await call

    reward = 0.0
    try:
        transcript = Transcript(chat.prompt(await within(environment.initial_messages())))
        for reply in replies:
            tokens = [*chat.tokens(reply), chat.end_id]
            transcript.add_reply(tokens, logprobs=[0.0] * len(tokens), versions=[0] * len(tokens))
            step = await within(environment.step(reply))
            reward += step.reward
            if step.done:
                break
            transcript.add_observation(chat.continuation(step.messages, ended=True))
    except TimeoutError:
        raise ValueError(
            f"{type(environment).__name__}: no answer to a reply of its demonstration within "
            f"data.timeout_s={timeout_s:g}"
        ) from None
    finally:
        close_environment(environment)
    return transcript.sample(
        group_id=group_id, index=index, reward=reward, metadata=environment.describe()
    )


def _check_types(kind: type[Environment], data: DataConfig) -> None:
    """ValueError for an argument that is not the number, text or bool that the class declares."""
    parameters = inspect.signature(kind).parameters
    for name, value in data.args.items():
        wanted = parameters[name].annotation if name in parameters else None
        if wanted not in (int, float, bool, str):
            continue
        fits = (int, float) if wanted is float else wanted
        if not isinstance(value, fits) or (isinstance(value, bool) and wanted is not bool):
            shown = _shown({name: value})[name]
            raise ValueError(
                f"data.args.{name}={shown!r}: data.task={data.task} wants {wanted.__name__}"
            )


def _shown(args: Mapping[str, Any]) -> dict[str, Any]:
    """For an error: without what may hold a key."""
    return {
        name: "(left out)" if name == "api_key" or isinstance(value, Mapping) else value
        for name, value in args.items()
    }
