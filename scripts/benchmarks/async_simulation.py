"""Training and generation side by side as discrete events (simpy), with the real data buffer.

Engines share their time among the sequences they decode: one of n sequences gets a token every
token_s + token_per_sequence_s * n seconds. Trainers take a batch when the buffer gives one, train
for step_s + step_per_token_s * tokens, then push for push_s. Not in it: prefill, and that a push
stops the engines.
"""

import dataclasses
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import simpy

from rollout.buffer import DataBuffer
from rollout.buffer_state import Lease
from rollout.types import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the events cost; seconds."""

    num_engines: int
    token_s: float
    token_per_sequence_s: float
    """Of one engine."""
    max_sequences: int
    """That one engine decodes at a time, as its KV cache allows; others wait."""
    step_s: float
    step_per_token_s: float
    push_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Of one simulated run."""

    tokens_per_s: float
    engine_busy: float
    """Share of the time in which an engine has something to decode."""
    staleness_max: int


class _Engine:
    """Sequences that share an engine: each is done when the engine's clock reaches its end.

    The clock counts tokens per sequence; it runs slower the more there are.
    """

    def __init__(self, env: simpy.Environment, machine: Machine) -> None:
        self._env, self._machine = env, machine
        self._clock = self._seen = self.busy_s = 0.0
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._waiting: deque[tuple[int, simpy.Event]] = deque()
        self._tie = itertools.count()
        self._changed = env.event()
        env.process(self._run())

    @property
    def load(self) -> int:
        """Sequences in it, and before it."""
        return len(self._ends) + len(self._waiting)

    def decode(self, num_tokens: int) -> simpy.Event:
        """An event: so many tokens have been made."""
        self._advance()
        done = self._env.event()
        self._waiting.append((num_tokens, done))
        self._admit()
        if not self._changed.triggered:
            self._changed.succeed()
        return done

    def _admit(self) -> None:
        while self._waiting and len(self._ends) < self._machine.max_sequences:
            num_tokens, done = self._waiting.popleft()
            heapq.heappush(self._ends, (self._clock + num_tokens, next(self._tie), done))

    def _pace(self) -> float:
        return self._machine.token_s + self._machine.token_per_sequence_s * len(self._ends)

    def _advance(self) -> None:
        passed = self._env.now - self._seen
        if self._ends:
            self._clock += passed / self._pace()
            self.busy_s += passed
        self._seen = self._env.now

    def _run(self) -> Generator[simpy.Event, None, None]:
        while True:
            self._changed = self._env.event()
            waits = [self._changed]
            if self._ends:
                left = max(0.0, self._ends[0][0] - self._clock)
                waits.append(self._env.timeout(left * self._pace()))
            yield simpy.AnyOf(self._env, waits)
            self._advance()
            while self._ends and self._ends[0][0] <= self._clock + 1e-6:
                heapq.heappop(self._ends)[2].succeed()
            self._admit()


@dataclass(kw_only=True)
class _Run:
    env: simpy.Environment
    machine: Machine
    buffer: DataBuffer
    lengths: Callable[[int], list[int]]
    engines: list[_Engine]
    finished: simpy.Event
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)

    def admit(self) -> None:
        """Start every group that the bound allows."""
        while (lease := self.buffer.lease()) is not None:
            self.env.process(self.group(lease))

    def group(self, lease: Lease) -> Generator[simpy.Event, None, None]:
        """All samples of a group, on the least loaded engine."""
        lengths = self.lengths(lease.group_id)
        engine = min(self.engines, key=lambda each: each.load)
        yield simpy.AllOf(self.env, [engine.decode(length) for length in lengths])
        self.tokens[lease.group_id] = sum(lengths)
        self.buffer.accept(
            Group(group_id=lease.group_id, start_version=lease.start_version, samples=[])
        )
        if not self.finished.triggered:
            self.finished.succeed()


def simulate(
    machine: Machine,
    *,
    lengths: Callable[[int], list[int]],
    groups_per_step: int,
    staleness: int,
    num_steps: int,
) -> Result:
    """A run of num_steps. lengths: tokens of a group's samples, by group id."""
    env = simpy.Environment()
    buffer = DataBuffer(
        groups_per_step=groups_per_step, max_staleness_steps=staleness, num_steps=num_steps
    )
    engines = [_Engine(env, machine) for _ in range(machine.num_engines)]
    run = _Run(
        env=env,
        machine=machine,
        buffer=buffer,
        lengths=lengths,
        engines=engines,
        finished=env.event(),
    )
    trained, oldest = [0], [0]

    def trainer() -> Iterator[simpy.Event]:
        for step in range(num_steps):
            buffer.publish(step)
            run.admit()
            while (batch := buffer.take()) is None:
                run.finished = env.event()
                yield run.finished
            oldest[0] = max(oldest[0], *(step - group.start_version for group in batch))
            tokens = sum(run.tokens.pop(group.group_id) for group in batch)
            yield env.timeout(machine.step_s + machine.step_per_token_s * tokens + machine.push_s)
            trained[0] += tokens

    env.run(until=env.process(trainer()))  # pyright: ignore[reportArgumentType]
    busy = sum(engine.busy_s for engine in engines) / (env.now * len(engines))
    return Result(
        tokens_per_s=trained[0] / env.now, engine_busy=min(1.0, busy), staleness_max=oldest[0]
    )


def pareto_lengths(
    seed: int, *, samples: int, shortest: int, alpha: float, longest: int
) -> Callable[[int], list[int]]:
    """Tokens of each sample of a group: shortest * Pareto(alpha), at most `longest`."""
    import random

    def lengths(group_id: int) -> list[int]:
        rng = random.Random(seed * 1_000_003 + group_id)
        draws = (shortest * rng.paretovariate(alpha) for _ in range(samples))
        return [min(longest, math.ceil(draw)) for draw in draws]

    return lengths
