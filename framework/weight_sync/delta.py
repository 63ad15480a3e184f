"""What changed since the last version, to the engines, through a directory that both sides see.

    rank 0          writes run_dir/weights/version_<n>: for each parameter of an engine rank the
                    change of its bits, compressed (`delta_chain.py`); orders the engines to take it
    engine ranks    `rollout.server.delta`: check that they hold what it follows, change their
                    parameters, compare every checksum, answer by a file

An engine that does not hold what a version follows (it was started again, or missed one), or finds
it damaged, says so and is given all content in the same push; so is every engine each
weight_sync.full_every_pushes.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from framework.weight_sync.base import PushContext
from framework.weight_sync.delta_chain import DeltaChain, Written
from framework.weight_sync.directory import DirectoryTransport
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.orders import ENDPOINT, order_body
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket
from rollout.server.delta import LOADER


class DeltaPush(DirectoryTransport):
    """Rank 0 holds a copy of what the engines hold, and writes how it changes."""

    def __init__(self, context: PushContext) -> None:
        super().__init__(context)
        self._chain: DeltaChain | None = None
        self._holders: set[str] = set()
        """Engines that took a version; whether they are still the same processes, they tell."""
        self._since_full = 0
        self._written: Written | None = None
        """What was prepared."""

    def prepare(
        self, version: int, buckets: Iterable[Bucket], verifier: ExpectedChecksums | None
    ) -> None:
        """Compare with what the engines hold, encode the changes, write them; once a version."""
        context = self.context
        chain = self._chain = self._chain or DeltaChain(
            context.plan.hf_config,
            context.engine_tp,
            context.engine_dtype,
            context.engine_device,
        )
        if self._is_prepared(version):
            if verifier is not None:
                for bucket in buckets:
                    verifier.add(bucket)
            return
        due = 0 < context.full_every_pushes <= self._since_full + 1
        self._written = chain.advance(
            version,
            buckets,
            self.new_directory(version) / "change",
            all_content=due,
            take=verifier.add if verifier is not None else lambda _: None,
        )
        self._since_full = 0 if self._written.follows is None else self._since_full + 1

    def _is_prepared(self, version: int) -> bool:
        """By an earlier push that failed or went to others; what that was answered is gone."""
        chain, written = self._chain, self._written
        if chain is None or written is None or not chain.version == written.version == version:
            return False
        if not written.directory.is_dir():
            return False
        for answer in written.directory.glob("answer_*.json"):
            answer.unlink()
        shutil.rmtree(written.directory.with_name("all"), ignore_errors=True)
        return True

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        assert self._chain is not None
        assert self._written is not None
        engines.begin_session()
        size = self._give(self._chain, self._written, engines)
        engines.post("/end_weight_update", {})
        self.drop_others(self.directory(version))
        return size

    def _give(self, chain: DeltaChain, written: Written, engines: Engines) -> int:
        """To those that may hold what it follows; all content to the rest. Most bytes to one."""
        fits = [u for u in engines.urls if written.follows is None or u in self._holders]
        refused = self._ask(written, engines, fits)
        self._holders |= set(fits)
        size = written.size_bytes if fits else 0
        if written.follows is None:
            whole, rest = written, []
        else:
            for url, why in refused.items():
                print(f"weight_sync=delta: {url}: {why}; all weights follow", flush=True)
            rest = [url for url in engines.urls if url not in fits or url in refused]
            if not rest:
                return size
            whole = chain.all_content(written.directory.with_name("all"))
            refused = self._ask(whole, engines, rest)
            self._holders |= set(rest)
            size += whole.size_bytes
        if refused:
            lines = "; ".join(f"{url}: {why}" for url, why in refused.items())
            raise WeightSyncError(f"not every engine took all weights: {lines}")
        return size

    def _ask(self, written: Written, engines: Engines, urls: Sequence[str]) -> dict[str, str]:
        """Let these engines take a directory; why those that did not did not."""
        if not urls:
            return {}
        context, bodies, answers = self.context, [], {}
        for url in urls:
            number = engines.urls.index(url)
            answers[url] = [
                written.directory / f"answer_{number}_{rank}.json"
                for rank in range(context.engine_tp)
            ]
            orders = [
                {"directory": str(written.directory), "rank": rank, "answer": str(answer)}
                for rank, answer in enumerate(answers[url])
            ]
            rest = {"weight_version": str(written.version), "flush_cache": context.flush_cache}
            bodies.append(order_body(LOADER, orders, **rest))
        some = engines.only(urls)
        try:
            some.finish(some.start(ENDPOINT, bodies))
        finally:
            some.close()
        wrong = {url: _first_wrong(files) for url, files in answers.items()}
        return {url: why for url, why in wrong.items() if why}


def _first_wrong(answers: Sequence[Path]) -> str:
    """What the first rank that did not take it says; empty: all took it."""
    for rank, path in enumerate(answers):
        try:
            wrong = json.loads(path.read_text(encoding="utf-8"))["wrong"]
        except (OSError, ValueError, KeyError) as error:
            wrong = f"no answer: {error}"
        if wrong:
            return f"rank {rank}: {wrong}"
    return ""
