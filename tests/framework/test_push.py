"""Pushes to the session's real server, from a rank that holds the weight table's tensors."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bare_models import BareRank, bare_plan, random_weights

from framework.weight_sync import TRANSPORTS, WeightSync
from framework.weight_sync.base import PushContext
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.roster import Roster
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.export import Bucket, ExportBuffers
from megatron_bridge.fp8 import dequantize, linear_names, quantize
from megatron_bridge.layout import Layout
from rollout.run_dir import RunDir


class Pusher:
    """One trainer rank and the shared server."""

    def __init__(self, engine, hf_dir: Path, root: Path, transport: str) -> None:
        self.engine = engine
        self.run_dir = RunDir(root / "run")
        self.run_dir.create()
        self.write_address(1)
        self.plan = bare_plan(hf_dir, Layout())
        self.rank = BareRank(self.plan, 0)
        self.context = PushContext(
            plan=self.plan,
            chunks=self.rank.chunks,
            buffers=ExportBuffers(),
            rank=0,
            engine_tp=1,
            engine_device="cpu",
            engine_dtype=torch.float32,
            host="127.0.0.1",
            scratch_dir=self.run_dir.path / "weights",
            like=hf_dir,
            flush_cache=True,
        )
        self.engines = Engines([engine.url], engine.api_key, 60.0)
        self.sync: Any = WeightSync(
            transport,
            self.context,
            self.engines,
            pause_mode="retract",
            verify=True,
            roster=Roster(self.run_dir, 1, 0.5),
            admits=True,
        )

    def wrong(self, weights: dict[str, torch.Tensor], reply: dict[str, Any]) -> list[str]:
        """What an engine that answered `reply` does not hold of `weights`."""
        expected = ExpectedChecksums(self.plan.hf_config, 1, torch.float32, "cpu")
        shapes = [tuple(tensor.shape) for tensor in weights.values()]
        dtypes, tensors = [torch.float32] * len(weights), list(weights.values())
        expected.add(Bucket(list(weights), dtypes, shapes, torch.empty(0), tensors))
        return expected.compare(reply)

    def write_address(self, pid: int) -> None:
        """As the engine's launcher does; another pid: it was started again."""
        content = json.dumps({"url": self.engine.url, "pid": pid})
        self.run_dir.address_file("engine_0").write_text(content)

    def generate(self, num_tokens: int = 8) -> list[int]:
        """The version of each token of an answer."""
        reply = httpx.post(
            f"{self.engine.url}/generate",
            json={
                "input_ids": [1, 5, 9],
                "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True},
            },
            headers={"Authorization": f"Bearer {self.engine.api_key}"},
            timeout=60,
            trust_env=False,
        ).json()
        meta = reply["meta_info"]
        whole = [{"version": meta["weight_version"], "start": 0, "end": num_tokens}]
        spans = meta.get("weight_versions") or whole
        return [int(s["version"]) for s in spans for _ in range(s["start"], s["end"])]


@pytest.fixture
def pusher(request, engine, tiny_model_dir, tmp_path, monkeypatch) -> Iterator[Pusher]:
    monkeypatch.setattr("framework.weight_sync._NOTICE_S", 0.1)
    pusher = Pusher(engine, tiny_model_dir, tmp_path, getattr(request, "param", "distributed"))
    yield pusher
    pusher.engines.post("/continue_generation", {})
    pusher.sync.close()


def test_an_engine_started_again_serves_nothing_before_it_has_the_current_version(pusher):
    """It is held, a request waits; the trainers bring it up; the answer is of their version."""
    pusher.rank.fill(random_weights(pusher.plan, 0))
    pusher.sync.push(6)
    assert pusher.generate() == [6] * 8
    assert pusher.sync.admit(6) == []
    pusher.engine.hold()
    pusher.write_address(2)
    pusher.rank.fill(random_weights(pusher.plan, 1))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(pusher.generate)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        assert pusher.sync.ask(7, lambda: waiting.result(timeout=30)) == [7] * 8
    assert pusher.sync.admit(7) == []  # it has been met


@pytest.mark.parametrize("pusher", sorted(TRANSPORTS), indirect=True)
def test_a_push_that_fails_before_it_touches_an_engine_leaves_the_old_version(pusher):
    pusher.rank.fill(random_weights(pusher.plan, 0))
    pusher.sync.push(1)

    def refuse(*_: object, **__: object) -> None:
        raise WeightSyncError("the store is full")

    send = pusher.sync._transport.send
    pusher.sync._transport.send = refuse
    with pytest.raises(WeightSyncError, match="store is full; the engines go on as they were"):
        pusher.sync.push(2)
    assert pusher.generate() == [1] * 8
    pusher.sync._transport.send = send
    pusher.rank.fill(random_weights(pusher.plan, 2))
    pusher.sync.push(3)
    assert pusher.generate() == [3] * 8


def test_weights_in_doubt_are_not_served(pusher):
    pusher.rank.fill(random_weights(pusher.plan, 0))
    pusher.sync.push(1)
    compare = pusher.sync._compare
    pusher.sync._compare = lambda *_: _raise("other weights")
    with pytest.raises(WeightSyncError, match="other weights; the engines stay paused"):
        pusher.sync.push(2)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(pusher.generate)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        pusher.sync._compare = compare
        pusher.sync.push(3)
        assert waiting.result(timeout=30) == [3] * 8


def test_without_an_engine_a_push_says_what_it_waited_for(pusher):
    os.unlink(pusher.run_dir.address_file("engine_0"))
    with pytest.raises(TimeoutError, match=r"rollout\.engine\.start_timeout_s=0.5"):
        pusher.sync.push(1)


@pytest.mark.parametrize("pusher", ["delta"], indirect=True)
def test_what_did_not_change_does_not_travel(pusher):
    """Checksums of all that the engine holds are compared after each of these pushes."""
    weights = random_weights(pusher.plan, 0)
    pusher.rank.fill(weights)
    whole = pusher.sync.push(1).size_bytes
    for version in (2, 3):
        weights["model.layers.1.mlp.down_proj.weight"][version] += 1.0
        pusher.rank.fill(weights)
        assert 0 < pusher.sync.push(version).size_bytes < whole / 100
        assert pusher.generate() == [version] * 8


@pytest.mark.parametrize("pusher", ["delta", "disk"], indirect=True)
def test_the_engine_generates_while_its_next_version_is_written(pusher):
    weights = random_weights(pusher.plan, 0)
    pusher.rank.fill(weights)
    pusher.sync.push(1)
    prepare, generated = pusher.sync._transport.prepare, []

    def and_generate(*arguments: object) -> None:
        prepare(*arguments)
        generated.append(pusher.generate())

    pusher.sync._transport.prepare = and_generate
    pusher.rank.fill(random_weights(pusher.plan, 2))
    assert pusher.sync.push(2).size_bytes > 0
    assert generated == [[1] * 8]
    assert pusher.generate() == [2] * 8


@pytest.mark.parametrize("pusher", ["delta", "disk"], indirect=True)
def test_what_cannot_be_written_leaves_the_old_version(pusher):
    pusher.rank.fill(random_weights(pusher.plan, 0))
    pusher.sync.push(1)
    pusher.context.scratch_dir = Path("/proc/nowhere")
    with pytest.raises(WeightSyncError, match=r"version 2 could not be written: .*/proc/nowhere"):
        pusher.sync.push(2)
    assert pusher.generate() == [1] * 8
    pusher.context.scratch_dir = pusher.run_dir.path / "weights"
    pusher.sync.push(3)
    assert pusher.generate() == [3] * 8


def test_an_engine_of_rounded_weights_holds_them_and_no_others(pusher):
    """fp8_rounded: what is compared after the push are the rounded values; norms stay."""
    pusher.sync._quantization = "fp8_rounded"
    weights = random_weights(pusher.plan, 5)
    pusher.rank.fill(weights)
    pusher.sync.push(5)
    (reply,) = pusher.engines.checksums()
    lines = pusher.wrong(weights, reply)
    rounded = {
        name: dequantize(*quantize(weights[name])) for name in linear_names(pusher.plan.model)
    }
    assert pusher.wrong(weights | rounded, reply) == []
    assert len(rounded) == 7 * 2
    assert {line.split()[3] for line in lines} == {
        f"model.layers.{k}.{name}.weight"
        for k in range(2)
        for name in (
            *("self_attn.qkv_proj", "self_attn.o_proj"),
            *("mlp.gate_up_proj", "mlp.down_proj"),
        )
    }


def _raise(message: str) -> None:
    raise WeightSyncError(message)
