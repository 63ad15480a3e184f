"""Where other people's code begins: whatever goes wrong there is one episode's, with its reason."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from rollout.bounds import Bound
from rollout.environments.base import ROLES, Environment, Message, is_message
from rollout.types import Sample, Status

T = TypeVar("T")
logger = logging.getLogger(__name__)

_CLEAR_UP_S = 5.0
_left: set[asyncio.Task] = set()
"""Calls that were given up and have not ended: the event loop alone would let go of them."""


class EpisodeError(Exception):
    """Environment or reward failed, or nobody can answer; the message says how."""


@contextlib.contextmanager
def boundary(what: str) -> Iterator[None]:
    """Around foreign code and the use of what it gave: all that goes wrong is an EpisodeError.

    sys.exit() of an environment is its own end, not ours. A CancelledError that nobody sent us is
    its own as well: it would end our task without a word, and its group would never come.
    """
    try:
        yield
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            raise
        raise EpisodeError(f"{what}: {type(error).__name__}: {error}") from error


async def guarded(
    call: Awaitable[T], what: str, limit_s: float, places: asyncio.Semaphore | None = None
) -> T:
    """What foreign code gives within limit_s; else EpisodeError. It has one of the places, and the
    wait for that is not its time.

    It runs as a task of its own: code that is cancelled may clear up for a moment, and one that
    takes no notice (`except:` in a loop) is left alone then, and holds up nobody.
    """

    async def contained() -> T:
        with boundary(what):
            return await call

    async with places or contextlib.nullcontext():
        try:
            async with Bound(limit_s):  # the task must know it, for off_the_clock
                task = asyncio.create_task(contained())
                try:
                    await asyncio.wait({task})
                finally:
                    await _end(task)
        except TimeoutError:
            raise EpisodeError(f"{what}: no answer within {limit_s:g} s") from None
        return task.result()


async def _end(task: asyncio.Task) -> None:
    if task.done():
        return
    _left.add(task)
    task.add_done_callback(_forget)
    task.cancel()
    await asyncio.wait({task}, timeout=_CLEAR_UP_S)
    if not task.done():
        logger.warning("a call that was given up takes no notice: %r", task)


def _forget(task: asyncio.Task) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # nobody asks what came of it


def close_environment(environment: Environment) -> None:
    """Its episode is over; where it fails to give up what it holds, that is told."""
    try:
        environment.close()
    except (Exception, SystemExit) as error:  # somebody else's code
        logger.warning("%s.close: %s: %s", type(environment).__name__, type(error).__name__, error)


def check_messages(messages: Iterable[Message]) -> None:
    """ValueError where a template would render something else than was meant."""
    for message in messages:
        if not is_message(message):
            raise ValueError(
                f"message {message!r}: role ({', '.join(ROLES)}) and content, a text, are wanted"
            )


def failed_sample(sample: Sample, reason: str) -> Sample:
    """The sample as one that trains nothing and says why."""
    return replace(
        sample,
        status=Status.FAILED,
        metadata={"error": reason},
        reward=0.0,
        rewards={},
        turn_rewards=[0.0] * len(sample.turn_rewards),
        loss_mask=np.zeros_like(sample.loss_mask),
        rollout_logprobs=np.zeros_like(sample.rollout_logprobs),
        versions=np.full_like(sample.versions, -1),
        teacher_logprobs=_zeros(sample.teacher_logprobs),
        teacher_top_ids=_zeros(sample.teacher_top_ids),
        teacher_top_logprobs=_zeros(sample.teacher_top_logprobs),
        routes=None,
    )


def _zeros(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.zeros_like(values)
