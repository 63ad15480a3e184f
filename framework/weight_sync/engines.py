"""The trainers' side of the SGLang servers: pause, weight sessions, checksums. Every call bounded.

One trainer process talks to all engines, in parallel; whatever one of them refuses stops the push.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from rollout.run_dir import write_atomic

_KEEPALIVE_S = 2.0
"""Idle connections are dropped by us first: SGLang does so after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE),
and a push that meets it then has failed; it must not be sent twice."""

WEIGHTS, CACHES = "weights", ("kv_cache", "cuda_graph")
"""SGLang's names of what an engine can release."""
MEMORY = (WEIGHTS, *CACHES)

_NO_SESSION = "no weight-update session is open"


class WeightSyncError(RuntimeError):
    """An engine refused a weight update, or holds other weights than the trainers."""


class Engines:
    """All engines of a run, addressed together."""

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str,
        timeout_s: float,
        asleep_file: Path | None = None,
    ) -> None:
        """asleep_file: holds what sleeps, for a trainer that comes after one which died; no engine
        survives being told twice to release the same memory."""
        if not urls:
            raise ValueError("weight sync needs at least one engine address")
        self.urls = list(urls)
        self.in_doubt = False
        """An update has begun and not been seen to end well: the weights may be of two versions."""
        self._asleep_file = asleep_file
        self._api_key = api_key
        self.timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            timeout=timeout_s,
            headers=headers,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_S),
        )
        self._pool = ThreadPoolExecutor(len(self.urls), thread_name_prefix="engine")

    def close(self) -> None:
        """Drop the connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def only(self, urls: Sequence[str]) -> "Engines":
        """Some engines by themselves, with connections of their own: close them."""
        return Engines(urls, self._api_key, self.timeout_s)

    def start(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Future[Any]]:
        """Begin one POST per engine; `finish` collects the replies."""
        return [
            self._pool.submit(self._post, url, path, body)
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def finish(self, futures: Sequence[Future[Any]]) -> list[Any]:
        """The replies, in the engines' order.

        Raises:
            WeightSyncError: an engine failed, refused or did not answer in time.
        """
        return [future.result(timeout=self.timeout_s) for future in futures]

    def post(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The same request to every engine."""
        return self.finish(self.start(path, [body] * len(self.urls)))

    @contextlib.contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        """Generation stands still inside; running requests go on afterwards.

        When the body fails before an engine's weights were touched, the engines go on with the
        version they have; else they stay paused: no token may come from weights in doubt.

        Raises:
            WeightSyncError: the body's, with what the engines do now.
        """
        try:
            self.post("/pause_generation", {"mode": mode})
            yield
        except WeightSyncError as error:
            if self.in_doubt:
                raise WeightSyncError(f"{error}; the engines stay paused") from error
            self._go_on()
            raise WeightSyncError(f"{error}; the engines go on as they were") from error
        self.post("/continue_generation", {})

    def _go_on(self) -> None:
        """Continue where an engine still answers; what failed before is what gets reported."""
        for future in self.start("/continue_generation", [{}] * len(self.urls)):
            with contextlib.suppress(WeightSyncError):
                future.result(timeout=self.timeout_s)

    def sleep(self) -> None:
        """Stop generating and free weights and caches; what they held is lost.

        Requests that run are retracted: they go on, recomputed, once the caches are back.
        """
        self.post("/pause_generation", {"mode": "retract"})
        awake = [tag for tag in MEMORY if tag not in self._asleep()]
        if awake:
            self.post("/release_memory_occupation", {"tags": awake})
        self._note_asleep(MEMORY)

    def wake_weights(self) -> None:
        """Memory for weights again, with nothing in it: a push must follow."""
        self.post("/resume_memory_occupation", {"tags": [WEIGHTS]})
        self._note_asleep(CACHES)

    def wake_caches(self) -> None:
        """Memory for the caches again; generation goes on."""
        self.post("/resume_memory_occupation", {"tags": list(CACHES)})
        self._note_asleep(())
        self.post("/continue_generation", {})

    def _asleep(self) -> list[str]:
        if self._asleep_file is None or not self._asleep_file.exists():
            return []
        return json.loads(self._asleep_file.read_text(encoding="utf-8"))

    def _note_asleep(self, tags: Sequence[str]) -> None:
        if self._asleep_file is not None:
            write_atomic(self._asleep_file, json.dumps(list(tags)).encode())

    def begin_session(self) -> None:
        """Open a weight session: from now on the weights may be of two versions."""
        self.in_doubt = True
        self.post("/begin_weight_update", {})

    def end_session(self) -> None:
        """Close the weight session that a trainer which died has left open; they refuse a second.

        Harmless where none is open. Their weights stay in doubt until the next push.
        """
        for future in self.start("/end_weight_update", [{}] * len(self.urls)):
            try:
                future.result(timeout=self.timeout_s)
            except WeightSyncError as error:
                if _NO_SESSION not in str(error):
                    raise

    def checksums(self) -> list[Any]:
        """Each engine's own checksum of every tensor it holds."""
        return self.post("/weights_checker", {"action": "checksum"})

    def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        try:
            response = self._client.post(url + path, json=body)
        except httpx.TimeoutException:
            raise WeightSyncError(
                f"{url}{path}: no answer within weight_sync.timeout_s={self.timeout_s:g}"
            ) from None
        except httpx.TransportError as error:
            raise WeightSyncError(f"{url}{path}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise WeightSyncError(f"{url}{path}: {response.status_code} {response.text[:500]}")
        reply = response.json() if response.content else None
        if isinstance(reply, dict) and reply.get("success") is False:
            raise WeightSyncError(f"{url}{path}: {reply.get('message', reply)}")
        return reply
