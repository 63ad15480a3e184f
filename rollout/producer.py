"""Keeps the engines busy within the staleness bound and makes batches of what comes back.

No polling: a published version starts groups, a finished group wakes the steps that wait.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rollout.batch import domain_metrics, make_batch
from rollout.buffer_state import Lease
from rollout.client import EngineFailure
from rollout.domain import Domain
from rollout.filters import FilterFailure, keep_widest
from rollout.journal import drop_steps, read_step, step_path, write_step
from rollout.mixed_buffer import MixedBuffer, MixedState
from rollout.state import STATE_FORMAT, ProducerState, newest_state, state_after, write_start
from rollout.types import Group, Sample, Status, StepBatch
from rollout.wire import encode

logger = logging.getLogger(__name__)

_STEPS_IN_MEMORY = 2


class ProducerFailure(RuntimeError):
    """Generation ended for good; the message is the reason."""


class Producer:
    """Prompts -> groups -> buffer -> journaled batches."""

    def __init__(
        self,
        *,
        buffer: MixedBuffer,
        domains: Sequence[Domain],
        rollouts: Path,
        max_dropped_per_step: int = 0,
        keep_share: float = 1.0,
    ) -> None:
        """max_dropped_per_step: groups that filters may drop for one step before the run ends."""
        self.buffer = buffer
        self.domains = domains
        self.failure: str | None = None
        """Why generation ended for good."""
        self.failed = asyncio.Event()
        self._serving = -1
        """The version that the engines have, as the trainers say; -1: they have said nothing."""
        self._follows = False
        """Somebody was here before us: trainers may be at an older version than the buffer."""
        self._rollouts = rollouts
        self._max_dropped_per_step = max_dropped_per_step
        self._keep_share = keep_share
        self._changed = asyncio.Condition()
        self._delivery = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()
        self._times: dict[int, tuple[float, float]] = {}
        self._delivered: dict[int, tuple[StepBatch, list[Sample]]] = {}

    def publish(self, version: int) -> None:
        """The engines have this version: start every group that it allows.

        Trainers that replay the journal come to the buffer's version again; until then nothing
        starts.
        """
        if version >= self.buffer.version or not self._follows:
            self.buffer.publish(version)
        self._serving = version
        self._admit()

    async def batch(self, step: int, wait_s: float) -> tuple[StepBatch, list[Sample]] | None:
        """The batch of a step, the same whenever it is asked for; None when wait_s ran out.

        Raises ProducerFailure when it cannot come any more, ValueError for a step out of turn.
        """
        if step > self.buffer.next_step:
            raise ValueError(f"step {step} was asked for before step {self.buffer.next_step}")
        try:
            async with asyncio.timeout(wait_s):
                await self._wait_for(step)
        except TimeoutError:
            return None
        return await self._deliver(step)

    async def state_dict(self, step: int) -> ProducerState:
        """Everything, between the delivery of step - 1 and that of `step`; ValueError elsewhere.

        Where trainers replay the journal, what it says of that moment.
        """
        if 0 < step < self.buffer.next_step:
            path = step_path(self._rollouts, step - 1)
            if (state := await asyncio.to_thread(state_after, path)) is not None:
                return state
        if self.buffer.next_step != step:
            raise ValueError(
                f"the state before step {step} was asked for; step {self.buffer.next_step} is next"
            )
        return self._state(self.buffer.state_dict())

    def _state(self, buffer: MixedState) -> ProducerState:
        return ProducerState(format=STATE_FORMAT, buffer=buffer)

    def recover(self) -> None:
        """Take the place of the process that wrote our journal; before anything is published.

        Groups it had not delivered are generated (again). ValueError: the journal is damaged.
        """
        state = newest_state(self._rollouts)
        if state is not None:
            state.check()
            self._load(state)
            self._follows = True
            logger.info("goes on before step %d", self.buffer.next_step)

    async def go_back(self, step: int, state: ProducerState | None) -> None:
        """Trainers begin at `step`; nothing starts before publish().

        Steps from there on that are in our journal are delivered from it again. Where there are
        none, generation goes on from `state`. ValueError: neither is possible.
        """
        if state is not None:
            state.check()
        await self.close()
        async with self._delivery:
            if step < self.buffer.next_step and self._has_journaled(step):
                self._follows = True
            elif state is not None and state.buffer.next_step == step:
                await asyncio.to_thread(drop_steps, self._rollouts, step)
                await asyncio.to_thread(write_start, self._rollouts, state)
                self._load(state)
            elif step != self.buffer.next_step:
                raise ValueError(
                    f"trainers begin at step {step}, with no state of that moment; step "
                    f"{self.buffer.next_step} is next"
                )

    def _has_journaled(self, step: int) -> bool:
        steps = range(step, self.buffer.next_step)
        return all(step_path(self._rollouts, each).exists() for each in steps)

    def _load(self, state: ProducerState) -> None:
        self.buffer.load_state_dict(state.buffer)
        self._delivered.clear()
        self._times.clear()

    async def close(self) -> None:
        """Stop generating, until something is published."""
        self._serving = -1
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.buffer.give_back_all()

    async def _wait_for(self, step: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self.failure is not None
                    or self.buffer.next_step > step
                    or self.buffer.may_take()
                )
            )

    async def _deliver(self, step: int) -> tuple[StepBatch, list[Sample]]:
        """Take and journal a step once, however many ranks ask at the same time.

        Under the lock: a rank that asks while the step is being written waits for the file.
        """
        async with self._delivery:
            if step in self._delivered:
                return self._delivered[step]
            if self.failure is not None:
                raise ProducerFailure(self.failure)
            if step < self.buffer.next_step:
                return await asyncio.to_thread(read_step, step_path(self._rollouts, step))
            dropped, weights = self.buffer.dropped, self.buffer.shares.weights()
            groups = self.buffer.take()
            assert groups is not None, "the buffer promised a batch"
            self._abort(self.buffer.aborted)
            state = encode(self._state(self.buffer.outline()))
            batch, samples = self._make_batch(step, groups, dropped)
            if "" not in groups:
                batch.metrics |= domain_metrics(step, groups, dropped, weights)
            if all(sample.status is Status.FAILED for sample in samples):
                self._fail(f"every sample of step {step} failed: {samples[0].metadata['error']}")
                raise ProducerFailure(str(self.failure))
            try:
                await asyncio.to_thread(write_step, self._rollouts, batch, samples, state)
            except OSError as error:
                self._fail(f"the journal cannot be written: {error}")
                raise ProducerFailure(str(self.failure)) from error
            logger.info(
                "step %d: %d samples, reward %.3f, staleness %d, %.0f tokens/s",
                step,
                len(samples),
                batch.metrics["rollout/reward_mean"],
                batch.staleness_max,
                batch.metrics["rollout/tokens_per_s"],
            )
            self._delivered[step] = (batch, samples)
            self._delivered.pop(step - _STEPS_IN_MEMORY, None)
            return self._delivered[step]

    def _make_batch(
        self, step: int, taken: dict[str, list[Group]], dropped: dict[str, Counter[str]]
    ) -> tuple[StepBatch, list[Sample]]:
        groups = [group for each in taken.values() for group in each]
        kept = [group for each in taken.values() for group in keep_widest(each, self._keep_share)]
        counts = sum(dropped.values(), Counter())
        counts["low_spread"] += len(groups) - len(kept)
        now = time.monotonic()  # groups that came with a checkpoint have no times
        times = [self._times.pop(group.group_id, (now, now)) for group in groups]
        seconds = max(end for _, end in times) - min(start for start, _ in times)
        return make_batch(step, sorted(kept, key=lambda x: x.group_id), seconds, counts)

    def _admit(self) -> None:
        """Start all groups that may. Domains take turns: none has to wait for all of another's."""
        if self._serving < self.buffer.version:
            return
        waiting = list(self.domains)
        while waiting and self.failure is None:
            waiting = [domain for domain in waiting if self._start(domain)]

    def _start(self, domain: Domain) -> bool:
        if domain.num_running >= domain.max_running_groups:
            return False
        if (lease := self.buffer.lease(domain.name)) is None:
            return False
        domain.num_running += 1
        task = asyncio.create_task(self._run(domain, lease), name=f"group {lease.group_id}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(domain, done))
        return True

    def _abort(self, group_ids: list[int]) -> None:
        """Their requests end, and engines drop what they were sampling for them."""
        for group_id in group_ids:
            self._times.pop(group_id, None)
        names = {f"group {group_id}" for group_id in group_ids}
        for task in (each for each in self._tasks if each.get_name() in names):
            task.cancel()

    def _ended(self, domain: Domain, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        domain.num_running -= 1
        self._admit()  # after close() it starts none

    async def _run(self, domain: Domain, lease: Lease) -> None:
        try:
            start = time.monotonic()
            samples = await domain.generate(lease, self.buffer.prompt_of(lease.group_id))
            self._times[lease.group_id] = (start, time.monotonic())
            group = Group(
                group_id=lease.group_id, start_version=lease.start_version, samples=samples
            )
            why = domain.filters.reason(group)
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # aborted; foreign code would not be ended
                return
            if why:
                self._drop(domain, group, why)
            else:
                self.buffer.accept(group, domain.name)
        except (EngineFailure, FilterFailure) as error:
            self._fail(str(error))
        except Exception as error:
            # The environment boundary: its constructor is foreign code. Whatever ended this group,
            # a fault of our own too, must reach the trainers: they would wait for it otherwise.
            logger.exception("group %d", lease.group_id)
            of = f" of {domain.name}" if domain.name else ""
            self._fail(f"group {lease.group_id}{of}: {type(error).__name__}: {error}")
        async with self._changed:
            self._changed.notify_all()

    def _drop(self, domain: Domain, group: Group, why: str) -> None:
        """Not wanted: its lease is free again, but not without end."""
        self._times.pop(group.group_id)
        self.buffer.drop(group, why, domain.name)
        if self.buffer.num_dropped > self._max_dropped_per_step:
            dropped = self.buffer.dropped
            counts = ", ".join(
                f"{n} {why}{f' of {name}' if name else ''}"
                for name, counted in dropped.items()
                for why, n in counted.most_common()
            )
            error = next((s.metadata["error"] for s in group.samples if "error" in s.metadata), "")
            self._fail(
                f"step {self.buffer.next_step}: rollout.filters dropped {counts}; more than "
                "rollout.max_refills times the groups of a step. Is the task too hard or too easy "
                f"for this policy?{f' Last failure: {error}' if error else ''}"
            )

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            logger.error("generation ended: %s", reason)
        self.failed.set()
