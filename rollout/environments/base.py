"""The environment seam: messages in, messages, reward and done out.

An environment object is one episode of one prompt. It is made from the prompt's own seed, so the
samples of a group are objects made alike: same initial state.
"""

import string
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, TypedDict

_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


class Message(TypedDict):
    """One chat message."""

    role: str
    """system | user | assistant | tool"""
    content: str


ROLES = ("system", "user", "assistant", "tool")


def is_message(value: Any) -> bool:
    """Whether what came from a file is a Message (it may have further keys)."""
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
    )


@dataclass(kw_only=True, slots=True)
class EnvironmentStep:
    """What the environment says to one reply of the policy."""

    messages: list[Message] = field(default_factory=list)
    """Appended to the conversation; empty when done."""
    reward: float = 0.0
    """Of this turn; an episode's environment reward is the sum over its turns."""
    done: bool = True


class Environment(ABC):
    """One episode.

    Each call runs in an asyncio task of its own, one after the other: what belongs to one task (an
    anyio task group or cancel scope, a context variable) cannot be entered in one call and left in
    another. Keep it in a task that the environment starts, as rollout/tool_servers.py does.
    """

    hold_out: ClassVar[bool] = True
    """Keep evaluation prompts out of training, by `identity`. False where prompts are so few, or
    all alike, that no part of them can be set aside."""

    @classmethod
    def finite(cls, split: str, **args: Any) -> list[int] | None:
        """The seeds of all prompts of a split (train | sft | preference | eval) where there are
        only so many, each visited once an epoch; None: any seed makes one. args: data.args."""
        return None

    @abstractmethod
    def __init__(self, *, seed: int, **args: Any) -> None:
        """Subclasses name their own arguments: the keys of data.args. The same seed, the same
        initial state."""

    @abstractmethod
    async def initial_messages(self) -> list[Message]:
        """The prompt."""

    @abstractmethod
    async def step(self, reply: str) -> EnvironmentStep:
        """The policy's reply as text, without its end token. Not called for a truncated reply."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """The episode is over, however it ended: give up what is held beyond memory (a session, a
        process). Returns at once; may be called again, or where nothing was begun."""

    @abstractmethod
    def identity(self) -> str:
        """What distinguishes this prompt (its initial state) from others, cheap to compute."""

    def state(self) -> str:
        """What the policy faces before its next reply: two samples of a group for which it is equal
        are in the same situation (algorithm=gigpo compares them). Empty: told apart by the number
        of the turn alone.
        """
        return ""

    def describe(self) -> dict[str, str]:
        """For people and rewards: among others `prompt`, and `answer` where there is one."""
        return {}

    def demonstration(self) -> list[str]:
        """Replies, one a turn, for supervised training; ValueError where there are none.

        Right ones, unless an argument of the task asks for some that are not."""
        raise ValueError(f"{type(self).__name__} has no demonstrations: stage=sft cannot use it")

    def mistake(self, random: Random) -> list[str]:
        """Replies that are nearly right, one a turn, for pairs of preferences; ValueError where
        there are none. Unless a task knows better: one letter or digit of the last reply of the
        demonstration becomes another.
        """
        *first, last = self.demonstration()
        places = [i for i, letter in enumerate(last) if any(letter in kind for kind in _KINDS)]
        if not places:
            raise ValueError(
                f"{type(self).__name__}: no letter or digit to change in its answer {last!r}; "
                "write a mistake() of its own"
            )
        place = random.choice(places)
        kind = next(kind for kind in _KINDS if last[place] in kind)
        other = random.choice([letter for letter in kind if letter != last[place]])
        return [*first, f"{last[:place]}{other}{last[place + 1 :]}"]
