"""What a data buffer says of its groups: leases, and its state as it is saved."""

from dataclasses import dataclass, field

from rollout.types import Group


@dataclass(kw_only=True, slots=True)
class Lease:
    """A group that somebody is generating."""

    group_id: int
    start_version: int


@dataclass(kw_only=True, slots=True)
class StartedState:
    """The groups of one start version, as they are saved."""

    version: int
    first: int
    """How many groups had started before them."""
    undelivered: bytes
    """[groups]: 1 where one is neither delivered nor dropped, else 0."""


@dataclass(kw_only=True, slots=True)
class BufferState:
    """Everything a buffer holds, as it is saved."""

    version: int
    num_started: int
    """Groups ever: the prompt cursor."""
    next_step: int
    started: list[StartedState] = field(default_factory=list)
    """Of versions with groups that are not delivered, in order."""
    accepted: list[Group] = field(default_factory=list)
    """Those of them that are finished; the others are generated (again)."""
    num_dropped: int = 0
    """Ever."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Since the last step, by reason."""

    def check(self) -> None:
        """Raise ValueError where its parts do not fit each other."""
        end, last = 0, -1
        for each in self.started:
            if each.version <= last or each.first < end or each.undelivered.strip(b"\0\1"):
                raise ValueError(f"rollout state: the groups of version {each.version} are damaged")
            end, last = each.first + len(each.undelivered), each.version
        if end > self.num_started or last > self.version:
            raise ValueError(
                f"rollout state: groups up to {end} of version {last}, where {self.num_started} "
                f"have started until version {self.version}"
            )
