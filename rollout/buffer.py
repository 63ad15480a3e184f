"""The data buffer: which groups may start, which are running, which train next. Pure, no IO.

With B = groups per step, eta = max_staleness_steps and v = the policy version:

- a group may start only while (v + eta + 1) * B > groups accepted or running so far;
- a group that started at version w may be trained at step w + eta at the latest (its deadline),
  so a step takes the groups with the earliest deadlines, and waits for a running one when
  going on without it would leave more groups due by some later step than fit until then.

The first rule lets that always be possible: at most (t + 1) * B groups ever have a deadline of t
or earlier. The second keeps it so: nothing older than eta is ever trained, and nothing dropped.
With eta = 0 the batch of step s is exactly the B groups started at version s. Where steps differ in
size (a domain of a mixture has its share of each), the sizes of the steps take the place of B.

A finished group may be dropped instead of accepted; then one more may start, with a new id. Both
rules count groups not dropped, so the bound stays. With eta = 0 the batch is then the first B
groups from there on that are not dropped, in whatever order they finish.

A lease, an accepted or dropped group, and every group of a step cost the same however many there
are; a step that waits looks at each version of which groups are missing, at most eta + 1.
"""

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator

from rollout.buffer_state import BufferState, Lease
from rollout.started import Started
from rollout.types import Group


class DataBuffer:
    """Groups between their start and the step that trains them."""

    def __init__(
        self,
        *,
        groups_per_step: int | Callable[[int], int],
        max_staleness_steps: int,
        num_steps: int | None = None,
        first_id: int = 0,
        id_stride: int = 1,
        oversample: float = 0.0,
    ) -> None:
        """groups_per_step: B, or how many groups all steps up to a given one have, asked for steps
        from the last delivered one to version + max_staleness_steps.

        num_steps: no more groups start than that many steps can train (None: no limit).
        first_id, id_stride: of the group ids, for buffers side by side.
        oversample: with eta = 0, this share more groups start than a step has; those that finish
        first are its batch, and the others are dropped.
        """
        assert not oversample or not max_staleness_steps
        self._oversample = oversample
        self.aborted: list[int] = []
        """Groups that were there or running when the last step was taken without them."""
        if callable(groups_per_step):
            self._through = groups_per_step
        else:
            self._through = lambda step: (step + 1) * groups_per_step
        self._id_stride = id_stride
        self._num_started = 0
        self._first_id = first_id
        self._eta = max_staleness_steps
        self._num_steps = num_steps
        self.version = -1
        """Policy version that new groups start with; -1: nothing published, nothing may start."""
        self.next_step = 0
        self.dropped: Counter[str] = Counter()
        """Groups dropped since the last step, by reason."""
        self._num_dropped = 0
        self._running: dict[int, Lease] = {}
        self._returned: deque[Lease] = deque()
        # Versions with groups that are not delivered, in order: at most eta + 1 at a time.
        self._started: OrderedDict[int, Started] = OrderedDict()
        self.num_accepted = 0
        """Finished groups that wait for their step."""

    @property
    def num_running(self) -> int:
        """Groups that are being generated."""
        return len(self._running)

    def publish(self, version: int) -> None:
        """A new policy version serves: more groups may start."""
        if version < self.version:
            raise ValueError(f"version {version} was published after version {self.version}")
        self.version = version

    def lease(self) -> Lease | None:
        """Start a group, or None while the staleness bound forbids it."""
        if self._returned:
            lease = self._returned.popleft()
            self._running[lease.group_id] = lease
            return lease
        limit = self._through(self._last_step()) if self.version >= 0 else 0
        if self._oversample and 0 <= self.next_step <= self._last_step():
            limit += math.ceil(self._size() * self._oversample)
        if self._num_started - self._num_dropped >= limit:
            return None
        started = self._started.get(self.version)
        if started is None:
            started = Started(version=self.version, first=self._num_started)
            self._started[self.version] = started
        started.start()
        lease = Lease(group_id=self._id(self._num_started), start_version=self.version)
        self._num_started += 1
        self._running[lease.group_id] = lease
        return lease

    def give_back(self, group_id: int) -> None:
        """A running group was not finished by its holder: the next lease is this one again."""
        self._returned.append(self._take_running(group_id))

    def accept(self, group: Group) -> None:
        """A running group is finished."""
        lease = self._running.get(group.group_id)
        if lease is not None and lease.start_version != group.start_version:
            raise ValueError(
                f"group {group.group_id} was leased at version {lease.start_version} and says "
                f"{group.start_version}"
            )
        self._take_running(group.group_id)
        self._started[group.start_version].ready.push(group)
        self.num_accepted += 1

    def drop(self, group_id: int, why: str) -> None:
        """A running group is finished and not wanted: another may start in its place."""
        lease = self._take_running(group_id)
        self._leave(self._started[lease.start_version], group_id)
        self._num_dropped += 1
        self.dropped[why] += 1

    def may_take(self) -> bool:
        """Whether take() would give a batch now."""
        if self.version < 0 or self.next_step > self._last_step():
            return False
        return self.num_accepted >= self._size() and self._may_go_on()

    def take(self) -> list[Group] | None:
        """The groups of step `next_step`, ordered by id; None while it must wait.

        Earliest deadline first; see the module's docstring for when that must wait.
        """
        if not self.may_take():
            return None
        size, batch = self._size(), []
        for started in list(self._first_ready(size)):  # ids grow with versions: batch is in order
            for _ in range(min(size - len(batch), len(started.ready))):
                batch.append(started.ready.pop())
                self._leave(started, batch[-1].group_id)
        self.num_accepted -= size
        if self._oversample:
            self._drop_rest()
        self.next_step += 1
        self.dropped = Counter()
        return batch

    def blockers(self) -> list[int]:
        """Running groups, oldest first: what a waiting step waits for."""
        order = sorted(self._running.values(), key=lambda x: (x.start_version, x.group_id))
        return [lease.group_id for lease in order]

    def state_dict(self) -> BufferState:
        """Everything; groups that are running are generated again after a restart."""
        state = self.outline()
        state.accepted = [
            group for started in self._started.values() for group in started.ready.groups()
        ]
        return state

    def outline(self) -> BufferState:
        """The state without what was generated: finished groups are running ones in it."""
        return BufferState(
            version=self.version,
            num_started=self._num_started,
            next_step=self.next_step,
            started=[each.state() for each in self._started.values()],
            num_dropped=self._num_dropped,
            dropped=dict(self.dropped),
        )

    def give_back_all(self) -> None:
        """No running group was finished."""
        for group_id in list(self._running):
            self.give_back(group_id)
        self._returned = deque(sorted(self._returned, key=lambda lease: lease.group_id))

    def load_state_dict(self, state: BufferState) -> None:
        """Continue from a saved state, in a new buffer of the same settings.

        ValueError: it is damaged, or its groups would be older when trained than the bound here.
        """
        state.check()
        self.version = state.version
        self._num_started = state.num_started
        self.next_step = state.next_step
        self._num_dropped = state.num_dropped
        self.dropped = Counter(state.dropped)
        self._running = {}
        self._started = OrderedDict()
        for each in state.started:
            if any(each.undelivered):
                self._started[each.version] = Started.of(each)
        self._load_accepted(state.accepted)
        self._returned = deque(
            Lease(group_id=self._id(place), start_version=started.version)
            for started in self._started.values()
            for place in started.places()
            if self._id(place) not in started.ready
        )
        self._check_bound()

    def _load_accepted(self, groups: list[Group]) -> None:
        for group in groups:
            started = self._started.get(group.start_version)
            if started is None or not started.holds(self._place(group.group_id)):
                raise ValueError(
                    f"rollout state: group {group.group_id} of version {group.start_version} is "
                    "finished and was never started, or is delivered"
                )
            started.ready.push(group)
        self.num_accepted = len(groups)

    def _check_bound(self) -> None:
        if self._oversample:
            return
        due, delivered = 0, self._through(self.next_step - 1)
        for started in self._started.values():
            due += started.num_undelivered
            last = started.version + self._eta
            binds = self.next_step <= last <= self._last_step()
            if binds and due > self._through(last) - delivered:
                raise ValueError(
                    f"rollout.max_staleness_steps={self._eta}: the state to go on from has {due} "
                    f"groups of version {started.version} or older, more than the steps up to "
                    f"{last} train; go on with the number that it was written with"
                )

    def _drop_rest(self) -> None:
        """The step has its groups: what is running or finished beyond them is not wanted."""
        rest = [group_id for each in self._started.values() for group_id in each.ready.ids()]
        self.aborted = sorted([*self._running, *rest])
        self._returned.clear()
        count = sum(each.num_undelivered for each in self._started.values())
        self._num_dropped += count
        self.dropped["surplus"] += count
        self._running.clear()
        self._started.clear()
        self.num_accepted = 0

    def _leave(self, started: Started, group_id: int) -> None:
        """A group is delivered or dropped; a version of which none is left leaves with it."""
        started.leave(self._place(group_id))
        if not started.num_undelivered:
            del self._started[started.version]

    def _id(self, place: int) -> int:
        return self._first_id + place * self._id_stride

    def _place(self, group_id: int) -> int:
        return (group_id - self._first_id) // self._id_stride

    def _take_running(self, group_id: int) -> Lease:
        lease = self._running.pop(group_id, None)
        if lease is None:
            raise ValueError(f"group {group_id} is not running: finished twice, or never leased")
        return lease

    def _may_go_on(self) -> bool:
        """Would the earliest accepted groups leave every later deadline within reach?"""
        if self._oversample:
            return True  # whoever is late is dropped
        due, in_batch, size = 0, 0, self._size()
        for started in self._started.values():
            due += started.num_undelivered
            in_batch += len(started.ready)
            if in_batch >= size:  # a whole step less is due: what was let start fits the others
                return True
            # What steps after this one may still train of this version.
            last = max(min(started.version + self._eta, self._last_step()), self.next_step)
            if due - in_batch > self._through(last) - self._through(self.next_step):
                return False
        return True

    def _first_ready(self, size: int) -> Iterator[Started]:
        """The oldest versions, until they have so many finished groups."""
        for started in self._started.values():
            yield started
            if (size := size - len(started.ready)) <= 0:
                return

    def _last_step(self) -> int:
        """The last one that groups may be started for."""
        last = self.version + self._eta
        return last if self._num_steps is None else min(last, self._num_steps - 1)

    def _size(self) -> int:
        """Groups of the next step."""
        return self._through(self.next_step) - self._through(self.next_step - 1)
