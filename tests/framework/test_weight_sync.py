"""The trainers' side of the engines: connections, without an engine."""

import importlib.util
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from framework.weight_sync import engines
from framework.weight_sync.engines import Engines


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
