"""Calls side by side that stand and fall together."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Q = TypeVar("Q")
E = TypeVar("E", bound=Exception)


async def ask_all(
    ask: Callable[[Sequence[Q]], Awaitable[Sequence[T]]], questions: Sequence[Q], refusal: type[E]
) -> list[T | E]:
    """Answers in order, asked for at once; where that is refused each is asked for alone, so that a
    refusal costs the one that it is about. Other errors are raised."""
    try:
        return [*await ask(questions)]
    except refusal as error:
        if len(questions) == 1:
            return [error]
    alone = await run_together(ask_all(ask, [each], refusal) for each in questions)
    return [answer for (answer,) in alone]


async def run_together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        first: Exception = failures
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]
