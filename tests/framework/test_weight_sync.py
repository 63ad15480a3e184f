"""The trainers' side of the engines: connections, without an engine."""

import importlib.util
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.weight_sync import engines
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.quantized import ROUNDED, in_fp8, rounded
from megatron_bridge.export import Bucket, ExportBuffers
from megatron_bridge.fp8 import FP8, dequantize


def test_an_idle_connection_is_dropped_before_the_engine_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A push that meets the engine's own closing would fail, and may not be sent twice."""
    connections = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            connections.add(self.client_address)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(engines, "_KEEPALIVE_S", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Engines([f"http://127.0.0.1:{server.server_port}"], "", 5.0)
        assert client.post("/x", {}) == client.post("/x", {}) == [{}]
        assert len(connections) == 1
        time.sleep(0.5)
        assert client.post("/x", {}) == [{}]
        assert len(connections) == 2
        client.close()
        server.shutdown()


def test_our_idle_time_is_shorter_than_that_of_the_installed_sglang() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "srt", "environ.py").read_text()
    found = re.search(r"SGLANG_TIMEOUT_KEEP_ALIVE = EnvInt\((\d+)\)", source)
    assert found is not None
    assert int(found[1]) / 2 > engines._KEEPALIVE_S


def sglang_bucket() -> Any:
    """SGLang's module of flattened buckets, which imports torch alone, without the rest of it."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "srt", "weight_sync", "tensor_bucket.py")
    spec = importlib.util.spec_from_file_location("tensor_bucket", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["tensor_bucket"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bucket_in_fp8_is_what_sglangs_receiver_takes_apart(dtype):
    """Values and scales within the format's bound, of odd shapes too; the rest bit for bit."""
    theirs = sglang_bucket()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in [("a", (3,)), ("w", (192, 130)), ("b", (5, 7)), ("v", (1, 129))]
    }
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in weights.values()])
    shapes = [tuple(tensor.shape) for tensor in weights.values()]
    bucket = Bucket(list(weights), [dtype] * 4, shapes, flat, list(weights.values()))
    (sent,) = in_fp8(iter([bucket]), {"w", "v"}, ExportBuffers())
    names = [str(each).removeprefix("torch.") for each in sent.dtypes]
    received = theirs.FlattenedTensorBucket.empty(sent.names, names, sent.shapes, "cpu")
    received.get_flattened_tensor().copy_(sent.flat)
    found = dict(received.reconstruct_tensors())
    assert found.keys() == {"a", "w", "b", "v", "w_scale_inv", "v_scale_inv"}
    assert found["a"].equal(weights["a"])
    assert found["b"].equal(weights["b"])
    for name in ("w", "v"):
        values, scales = found[name], found[f"{name}_scale_inv"]
        assert (values.dtype, scales.dtype) == (FP8, torch.float32)
        error = (dequantize(values, scales) - weights[name].float()).abs()
        scale = dequantize(torch.ones_like(values), scales)
        bound = torch.maximum(weights[name].float().abs() * 2**-4, scale * 2**-10)
        assert (error <= bound * (1 + 1e-5)).all()
    assert len(sent.flat) == sum(found[n].nbytes for n in found)


def test_a_weight_that_is_not_finite_is_named_and_not_sent():
    weight = torch.full((2, 2), torch.inf)
    bucket = Bucket(["w"], [weight.dtype], [(2, 2)], weight.view(torch.uint8), [weight])
    streams = [rounded(iter([bucket]), {"w"}, name) for name in ROUNDED]
    for stream in (in_fp8(iter([bucket]), {"w"}, ExportBuffers()), *streams):
        with pytest.raises(WeightSyncError, match="tensor w: it holds values that are not finite"):
            next(stream)
