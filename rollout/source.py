"""Where trainers get their batches: from the rollout process, or from another run's journal."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import httpx

from rollout.journal import read_step, step_path
from rollout.messages import (
    BatchRequest,
    Health,
    RestoreRequest,
    SamplesRequest,
    VersionRequest,
)
from rollout.state import ProducerState
from rollout.types import EvalResult, Sample, StepBatch
from rollout.wire import CONTENT_TYPE, decode, encode

T = TypeVar("T")

_LONG_POLL_MARGIN_S = 60.0
_RECONNECT_S = 10.0
"""How long one that nobody starts again is given before the run fails."""
_RETRY_S = 0.2


class BatchSource(Protocol):
    """What the training loop asks for. Every rank holds one."""

    def take(self, step: int) -> StepBatch:
        """The metadata of a step; the same however often and by whichever rank it is asked."""
        ...

    def fetch(self, step: int, indices: list[int]) -> list[Sample]:
        """Samples of a step by their places in StepBatch.samples, in that order."""
        ...

    def publish(self, version: int) -> None:
        """The engines serve this version (one rank calls it)."""
        ...

    def evaluate(self, version: int) -> EvalResult:
        """Accuracy on held-out prompts (one rank calls it)."""
        ...

    def snapshot(self, version: int) -> bytes:
        """What goes on from step `version` needs, for a checkpoint; b"": the step says it all."""
        ...

    def restore(self, step: int, state: bytes) -> None:
        """Training begins at `step`, with a snapshot of then; step 0 has none.

        One rank calls it, before anything is published, whether it is the first to do so or not.
        """
        ...

    def finish(self) -> None:
        """Nothing more will be asked for (one rank calls it)."""
        ...

    def missing(self) -> str:
        """What a batch that does not come waits for."""
        ...


class RolloutFailure(RuntimeError):
    """The rollout process said that it cannot go on, or refused a request."""


class RolloutGone(RolloutFailure):
    """The rollout process cannot be reached."""


class BufferClient:
    """The rollout process over HTTP."""

    def __init__(
        self,
        url: str,
        token: str,
        timeout_s: float,
        *,
        reconnect_s: float = _RECONNECT_S,
        find_url: Callable[[], str | None] = lambda: None,
    ) -> None:
        """timeout_s: bound of every wait (rollout.batch_timeout_s).

        reconnect_s: how long a process that cannot be reached is tried again; find_url: where the
        one that took its place is, None while there is none.
        """
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s
        self._find_url = find_url
        self._version: int | None = None
        """What we published last."""
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {token}", "Content-Type": CONTENT_TYPE},
            timeout=httpx.Timeout(_LONG_POLL_MARGIN_S, connect=5.0),
            trust_env=False,
        )

    def take(self, step: int) -> StepBatch:
        """Waits up to timeout_s; TimeoutError says what is missing."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            reply = self._post("/batch", BatchRequest(step=step))
            if reply.status_code == 200:
                return decode(reply.content, StepBatch)
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no batch for step {step} within rollout.batch_timeout_s="
                    f"{self._timeout_s:g}: {self._describe_health()}"
                )

    def fetch(self, step: int, indices: list[int]) -> list[Sample]:
        """Only what this rank trains."""
        reply = self._post("/samples", SamplesRequest(step=step, indices=indices))
        samples = decode(reply.content, list[Sample])
        if len(samples) != len(indices):
            raise RolloutFailure(f"{len(samples)} samples came where {len(indices)} were asked for")
        for sample in samples:
            sample.check()
        return samples

    def publish(self, version: int) -> None:
        """New groups start with this version."""
        self._version = version
        self._post("/version", VersionRequest(version=version))

    def evaluate(self, version: int) -> EvalResult:
        """Waits up to timeout_s."""
        message = VersionRequest(version=version)
        reply = self._post("/evaluate", message, timeout_s=self._timeout_s)
        return decode(reply.content, EvalResult)

    def snapshot(self, version: int) -> bytes:
        """Prompt cursor, running and finished groups, as the rollout process tells them."""
        return self._post("/state", VersionRequest(version=version)).content

    def restore(self, step: int, state: bytes) -> None:
        """ValueError: the checkpoint was saved without a rollout process."""
        if step and not state:
            raise ValueError("the checkpoint holds no rollout state: mode=train did not save it")
        found = decode(state, ProducerState) if state else None
        self._post("/restore", RestoreRequest(step=step, state=found))

    def finish(self) -> None:
        """The rollout process ends; one that has ended already may not have got to answer."""
        self._reconnect_s = min(self._reconnect_s, _RECONNECT_S)
        with contextlib.suppress(RolloutGone):
            self._post("/finish", None)

    def health(self) -> Health:
        """How the rollout process stands."""
        reply = self._http.get("/health", timeout=5.0)
        if reply.status_code != 200:
            raise RolloutFailure(f"{self._url}/health: status {reply.status_code}: {reply.text}")
        return decode(reply.content, Health)

    def missing(self) -> str:
        """As the rollout process tells."""
        return self._describe_health()

    def _describe_health(self) -> str:
        try:
            health = self.health()
        except (httpx.HTTPError, RolloutFailure, ValueError) as error:
            return f"the rollout process at {self._url} does not tell why ({error})"
        return (
            f"the rollout process is at policy version {health.policy_version} with "
            f"{health.accepted} groups finished and {health.running} running "
            f"(oldest: {health.waiting_for}) {health.failure}".rstrip()
        )

    def _post(self, path: str, message: object, timeout_s: float | None = None) -> httpx.Response:
        return self._send(path, encode(message), timeout_s)

    def _send(self, path: str, body: bytes, timeout_s: float | None = None) -> httpx.Response:
        """One request; a process that is lost is looked for and tried again for reconnect_s.

        Every request of ours may be repeated: asking twice gives the same answer, also of another
        process that has taken the place of the first.
        """
        timeout = httpx.Timeout(timeout_s or _LONG_POLL_MARGIN_S, connect=5.0)
        deadline: float | None = None
        while True:
            try:
                reply = self._http.post(path, content=body, timeout=timeout)
                break
            except httpx.ReadTimeout:
                raise TimeoutError(
                    f"{path}: no answer within {timeout.read:g} s: {self._describe_health()}"
                ) from None
            except httpx.TransportError as error:
                deadline = deadline or time.monotonic() + self._reconnect_s  # since it was lost
                if time.monotonic() > deadline:
                    raise RolloutGone(
                        f"the rollout process at {self._url} is gone ({path}: {error}); "
                        f"see logs/rollout.log in the run directory"
                    ) from None
                time.sleep(_RETRY_S)
                self._meet_again(path)
        if reply.status_code in (200, 204):
            return reply
        raise RolloutFailure(f"{path}: {reply.text or f'status {reply.status_code}'}")

    def _meet_again(self, path: str) -> None:
        """Whoever takes the place of a rollout process knows the journal, not what we published."""
        if url := self._find_url():
            self._url = url.rstrip("/")
            self._http.base_url = self._url
        if self._version is not None and path not in ("/version", "/restore", "/finish"):
            with contextlib.suppress(httpx.TransportError):
                told = encode(VersionRequest(version=self._version))
                reply = self._http.post("/version", content=told)
                if reply.status_code != 200:  # it would start nothing, and we wait in vain
                    raise RolloutFailure(f"/version: {reply.text or reply.status_code}")


class JournalSource:
    """mode=train_only: the batches that another run journaled."""

    def __init__(self, replay_dir: str | Path) -> None:
        self._rollouts = Path(replay_dir)
        if not self._rollouts.is_dir():
            raise ValueError(f"replay_dir={replay_dir}: no such directory")
        self._step = -1
        self._entry: tuple[StepBatch, list[Sample]] | None = None

    def take(self, step: int) -> StepBatch:
        """ValueError names the file that is missing or damaged."""
        return self._read(step)[0]

    def fetch(self, step: int, indices: list[int]) -> list[Sample]:
        """Samples by their places."""
        samples = self._read(step)[1]
        return [samples[k] for k in indices]

    def publish(self, version: int) -> None:
        """Nobody generates: nothing to do."""

    def evaluate(self, version: int) -> EvalResult:
        """There is no engine to ask."""
        raise ValueError(
            "mode=train_only has no engines: set eval.at_start=false eval.at_end=false"
        )

    def snapshot(self, version: int) -> bytes:
        """The journal stays where it is."""
        return b""

    def restore(self, step: int, state: bytes) -> None:
        """The step is enough."""

    def finish(self) -> None:
        """Nobody waits: nothing to do."""

    def missing(self) -> str:
        """A file, and that is told at once."""
        return ""

    def _read(self, step: int) -> tuple[StepBatch, list[Sample]]:
        if self._entry is None or self._step != step:
            self._entry = read_step(step_path(self._rollouts, step))
            self._step = step
        return self._entry
