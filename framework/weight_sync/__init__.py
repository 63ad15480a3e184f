"""Trainers to engines: pause, send, verify, continue.

push(version):   transport.prepare -> pause engines -> transport.send -> engine checksums == ours
                 -> continue
admit(version):  the same for engines that were started again meanwhile, and for them alone
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from framework.weight_sync.base import PushContext, PushReport, Transport
from framework.weight_sync.delta import DeltaPush
from framework.weight_sync.direct import DirectPush
from framework.weight_sync.disk import DiskPush
from framework.weight_sync.distributed import DistributedPush
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.quantized import in_fp8, rounded
from framework.weight_sync.roster import Roster
from framework.weight_sync.tensor import TensorPush
from framework.weight_sync.turns import Turns
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket, export_buckets
from megatron_bridge.fp8 import linear_names

TRANSPORTS: dict[str, type[Transport]] = {
    "distributed": DistributedPush,
    "delta": DeltaPush,
    "direct": DirectPush,
    "disk": DiskPush,
    "tensor": TensorPush,
}
T = TypeVar("T")

_MAX_PUSHES = 3
"""Of one version, when engines die under it."""
_NOTICE_S = 10.0
"""How soon the launcher of an engine that died is seen to have noticed."""
_ADMIT_EVERY_S = 1.0


class WeightSync:
    """Keeps the engines at the trainers' weights. Every trainer rank holds one."""

    def __init__(
        self,
        transport: str,
        context: PushContext,
        engines: Engines | None,
        *,
        pause_mode: str,
        verify: bool,
        turns: Turns | None = None,
        roster: Roster | None = None,
        admits: bool = False,
        quantization: str = "none",
    ) -> None:
        """turns: where trainers and engines share devices. admits: whether engines that die are
        started again; roster: who they are, on the pushing rank then."""
        self._context = context
        self._transport = TRANSPORTS[transport](context)
        self._engines = engines
        self._pause_mode = pause_mode
        self._turns = turns
        self._roster = roster
        self._admits = admits
        self._verify = verify
        self._quantization = quantization
        self._known: set[str] = set()
        """Engines that hold no open session of a trainer which died."""
        self._verifier: ExpectedChecksums | None = None
        if verify and engines is not None:
            self._verifier = ExpectedChecksums(
                context.plan.hf_config,
                context.engine_tp,
                context.engine_dtype,
                context.engine_device,
            )

    def push(self, version: int) -> PushReport:
        """Make every engine serve the trainers' weights as `version`; collective.

        An engine that dies meanwhile is left out; it is given them when it comes back (`admit`).

        Raises:
            WeightSyncError: an engine failed, or its own checksum of a tensor is not ours; the
                message names the tensors and tells whether the engines stay paused.
        """
        start, failure, report = time.perf_counter(), None, PushReport()
        for attempt in range(1, _MAX_PUSHES + 1):
            self._look_round()
            failure = None
            try:
                report = self._push_once(version, self._engines)
            except WeightSyncError as error:
                failure = error
            if not self._admits:  # nobody starts engines again
                break
            lost = failure is not None and attempt < _MAX_PUSHES and self._some_died()
            if not self._agree(lost):
                break
        if failure is not None:
            raise failure
        return PushReport(
            size_bytes=report.size_bytes,
            time_s=time.perf_counter() - start,
            verify_s=report.verify_s,
        )

    def admit(self, version: int) -> list[str]:
        """Give engines that were started anew the weights they lack, then let them serve.

        Collective; for moments at which the trainers hold exactly what was pushed as `version`. The
        other engines go on generating. Nothing, at the price of one broadcast, where none came.

        Returns:
            URLs of the engines that now serve, on the pushing rank.

        Raises:
            WeightSyncError: as `push`.
        """
        if not self._admits:
            return []
        newcomers = self._roster.newcomers() if self._roster is not None else []
        if not self._agree(bool(newcomers)):
            return []
        urls = [entry.url for entry in newcomers]
        some = self._engines.only(urls) if self._engines is not None else None
        try:
            self._push_once(version, some)
        except WeightSyncError as error:
            if not self._roster or not self._roster.wait_lost(_NOTICE_S, newcomers):
                raise
            print(f"weight_sync: an engine died before it could serve: {error}", flush=True)
            return []
        finally:
            if some is not None:
                some.close()
        if self._roster is not None and self._engines is not None:
            self._engines.urls = self._roster.meet(newcomers)
            print(f"weight_sync: {', '.join(urls)} serves version {version}", flush=True)
        return urls

    def ask(self, version: int, question: Callable[[], T]) -> T | None:
        """`question()` on the pushing rank; engines are admitted while it waits for its answer.

        Collective; the other ranks get None, when the answer is there.
        """
        if not self._admits:
            return question() if self._context.rank == 0 else None
        answer = _in_background(question) if self._context.rank == 0 else None
        while not self._agree(answer is not None and _is_done(answer, _ADMIT_EVERY_S)):
            self.admit(version)
        return answer.result() if answer is not None else None

    def trainers_turn(self) -> None:
        """Where devices are shared: the trainers have them, until the next push; collective."""
        if self._turns is not None:
            self._turns.trainers()

    def close(self) -> None:
        """The run is over: leave the engines to themselves, at the version they have."""
        if self._engines is not None:
            self._transport.close(self._engines)
            self._engines.close()

    def _push_once(self, version: int, engines: Engines | None) -> PushReport:
        """One attempt, to these engines; `engines` is None on all ranks but the pushing one."""
        verifier, start = self._verifier, time.perf_counter()
        with contextlib.ExitStack() as still:
            failure = None
            try:
                self._prepare(version, engines)
                still.enter_context(self._standing_still(engines))
                if engines is not None and not set(engines.urls) <= self._known:
                    engines.end_session()
            except WeightSyncError as error:
                failure = error
            if not self._agree(failure is None):  # else the others would send to nobody
                if failure is not None:
                    raise failure
                return PushReport()
            self._known.clear()
            size = self._send(version, engines)
            sent = time.perf_counter()
            if engines is not None:
                if verifier is not None:
                    self._compare(version, verifier, engines)
                engines.in_doubt = False
        if engines is not None:
            self._known.update(engines.urls)
        end = time.perf_counter()
        return PushReport(size_bytes=size, time_s=end - start, verify_s=end - sent)

    def _prepare(self, version: int, engines: Engines | None) -> None:
        """What needs no engine: they generate meanwhile."""
        if engines is not None and self._verifier is not None:
            self._verifier.reset()
        if not self._transport.prepares:
            return
        with self._stream() as buckets:
            if engines is None:
                next(buckets, None)  # takes part in the assembling
                return
            try:
                self._transport.prepare(version, buckets, self._verifier)
            except OSError as error:
                raise WeightSyncError(f"version {version} could not be written: {error}") from error

    def _send(self, version: int, engines: Engines | None) -> int:
        prepared = self._transport.prepares
        with contextlib.nullcontext(iter(())) if prepared else self._stream() as buckets:
            if engines is not None:
                return self._transport.send(version, buckets, engines, self._verifier)
            self._transport.assist()
            next(buckets, None)  # takes part in the assembling
            return 0

    @contextlib.contextmanager
    def _stream(self) -> Iterator[Iterator[Bucket]]:
        """The whole model, where it is needed."""
        context = self._context
        if not (self._transport.sends_whole_tensors or self._verify):
            yield iter(())
            return
        with export_buckets(
            context.plan, context.chunks, context.rank, buffers=context.buffers
        ) as stream:
            if self._quantization == "none":
                yield stream
                return
            names = linear_names(context.plan.model)
            if self._quantization == "fp8":
                yield in_fp8(stream, names, context.buffers)
            else:
                yield rounded(stream, names, self._quantization)

    def _standing_still(self, engines: Engines | None) -> contextlib.AbstractContextManager[None]:
        if self._turns is not None:
            return self._turns.pushing()
        if engines is not None:
            return engines.paused(self._pause_mode)
        return contextlib.nullcontext()

    def _compare(self, version: int, verifier: ExpectedChecksums, engines: Engines) -> None:
        replies = engines.checksums()
        for url, reply in zip(engines.urls, replies, strict=True):
            wrong = verifier.compare(reply)
            if wrong:
                raise WeightSyncError(
                    f"{url} holds other weights than the trainers after the push of version "
                    f"{version}: {'; '.join(wrong)}"
                )

    def _look_round(self) -> None:
        """Before a push: the engines are those that live."""
        if self._roster is not None and self._engines is not None:
            self._engines.urls = self._roster.meet(self._roster.wait_living())

    def _some_died(self) -> bool:
        """Whether what failed is explained by an engine that is gone."""
        return self._roster is not None and self._roster.wait_lost(_NOTICE_S)

    def _agree(self, said: bool) -> bool:
        """What the pushing rank says."""
        if self._context.plan.layout.world_size == 1:
            return said
        box = [said]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


def _in_background(question: Callable[[], T]) -> "Future[T]":
    """In a daemon thread: a trainer that fails meanwhile ends without its answer."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="question", daemon=True).start()
    return answer


def _is_done(answer: "Future[Any]", timeout_s: float) -> bool:
    return answer in wait([answer], timeout=timeout_s).done
