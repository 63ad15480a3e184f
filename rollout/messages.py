"""Requests and replies between trainers and the rollout process (msgpack, see rollout.wire)."""

from dataclasses import dataclass

from rollout.state import ProducerState


@dataclass(kw_only=True, slots=True)
class BatchRequest:
    """POST /batch -> StepBatch, or 204 when it is not ready yet: ask again."""

    step: int


@dataclass(kw_only=True, slots=True)
class SamplesRequest:
    """POST /samples -> list[Sample]."""

    step: int
    indices: list[int]
    """Places in StepBatch.samples."""


@dataclass(kw_only=True, slots=True)
class VersionRequest:
    """POST /version: new groups may start; /evaluate -> EvalResult; /state -> ProducerState."""

    version: int


@dataclass(kw_only=True, slots=True)
class RestoreRequest:
    """POST /restore: the trainers begin at this step."""

    step: int
    state: ProducerState | None = None
    """As /state gave it; None: they begin at the run's beginning."""


@dataclass(kw_only=True, slots=True)
class Health:
    """GET /health."""

    policy_version: int
    """-1: nothing published yet."""
    accepted: int
    """Finished groups that wait for their step."""
    running: int
    """Groups that are being generated."""
    ready: bool
    """Engines are known and the process takes requests."""
    failure: str = ""
    """Why generation ended for good."""
    waiting_for: list[int] | None = None
    """Ids of the oldest running groups."""
