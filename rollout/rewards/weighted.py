"""Several rewards by name, weighted and added: `data.rewards`.

    data:
      rewards:
        right: {kind: math}
        judge: {kind: judge, weight: 0.2, timeout_s: 20, max_retries: 2, args: {url: ..., ...}}

One that stays without an answer fails its sample, which trains nothing and is counted; with
`rollout.filters=[failed]` its group is dropped and replaced instead.
"""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rollout.bounds import Bound
from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.rewards.endpoint import ServiceBusyError
from rollout.types import Sample

_BACKOFF_S = 0.2
_RESERVED = ("overlong",)


@dataclass(kw_only=True, frozen=True, slots=True)
class RewardTerm:
    """One of `data.rewards`."""

    kind: str
    """A row of REWARDS or SERVICES, or a function of yours: package.module.function."""
    weight: float = 1.0
    timeout_s: float = 15.0
    """Bound of one attempt."""
    max_retries: int = 0
    """Further attempts after one that timed out or found a service busy."""
    args: dict[str, Any] = field(default_factory=dict)
    """Of a service: its url, or a `side_model` by its name, and so on."""

    @property
    def bound_s(self) -> float:
        """The longest that it may take."""
        waits = sum(_BACKOFF_S * 2**k for k in range(self.max_retries))
        return self.timeout_s * (self.max_retries + 1) + waits


class RewardFailedError(RuntimeError):
    """A reward gave no value; says which, and why."""


def read_terms(rewards: Mapping[str, Any]) -> dict[str, RewardTerm]:
    """`data.rewards` as terms. Raises ValueError with the key and what would be right."""
    terms = {}
    for name, row in rewards.items():
        key = f"data.rewards.{name}"
        if name in _RESERVED or not str(name).isidentifier():
            raise ValueError(f"{key}: choose another name, of letters, digits and _")
        if not isinstance(row, Mapping) or "kind" not in row:
            raise ValueError(f"{key}={row!r}: must be a mapping with a `kind`")
        known = [each.name for each in fields(RewardTerm)]
        for unknown in row:
            if unknown not in known:
                raise ValueError(f"{key}.{unknown}: unknown; one of {', '.join(known)}")
        terms[name] = _term(key, row)
    return terms


def _term(key: str, row: Mapping[str, Any]) -> RewardTerm:
    kind, args = row["kind"], row.get("args", {})
    if not isinstance(kind, str):
        raise ValueError(f"{key}.kind={kind!r}: must be a text")
    if not isinstance(args, Mapping):
        raise ValueError(f"{key}.args={args!r}: must be a mapping")
    numbers = {}
    for name, least in (("weight", -math.inf), ("timeout_s", 1e-3), ("max_retries", 0)):
        value = row.get(name, RewardTerm.__dataclass_fields__[name].default)
        whole = name == "max_retries"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{key}.{name}={value!r}: must be a {'whole ' * whole}number")
        if not math.isfinite(value) or value < least or (whole and value > 10):
            raise ValueError(f"{key}.{name}={value}: out of range")
        numbers[name] = value
    return RewardTerm(kind=kind, args=dict(args), **numbers)


def weighted(terms: Mapping[str, tuple[RewardTerm, RewardFunction]]) -> RewardFunction:
    """The sum of weight times value; each value is the component of its name.

    Terms are asked at the same time; the first that fails ends the others (RewardFailedError).
    """

    async def combined(sample: Sample, task: Task) -> Reward:
        calls = [
            asyncio.ensure_future(_ask(name, term, reward, sample, task))
            for name, (term, reward) in terms.items()
        ]
        try:
            values = dict(zip(terms, await asyncio.gather(*calls), strict=True))
        finally:
            for call in calls:
                call.cancel()
        total = math.fsum(terms[name][0].weight * value for name, value in values.items())
        return Reward(value=total, components=values)

    return combined


async def _ask(
    name: str, term: RewardTerm, reward: RewardFunction, sample: Sample, task: Task
) -> float:
    reason = ""
    for attempt in range(term.max_retries + 1):
        if attempt:
            await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        try:
            async with Bound(term.timeout_s):
                value = float((await reward(sample, task)).value)
        except TimeoutError:
            reason = f"no answer within {term.timeout_s:g} s"
        except ServiceBusyError as error:
            reason = str(error)
        except (
            Exception,
            SystemExit,
        ) as error:  # somebody else's code: the sample's failure names the reward
            raise RewardFailedError(f"{name}: {type(error).__name__}: {error}") from error
        else:
            if not math.isfinite(value):
                raise RewardFailedError(f"{name}: its value is {value}")
            return value
    raise RewardFailedError(f"{name}: {reason} ({term.max_retries + 1} attempts)")
