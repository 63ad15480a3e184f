"""One SGLang server as a process of ours: started with a bound, watched, ended as a whole.

`drivetrain-engine --run-dir RUN [--index 0]` runs one engine in the foreground: it writes its
address to the run directory, its log to logs/engine_<index>.log, and ends on SIGTERM or SIGINT.
"""

import argparse
import glob
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from rollout.config import EngineConfig, load_rollout_run
from rollout.process import LAUNCHER_PID, end_process_group, follow_launcher
from rollout.run_dir import RunDir
from rollout.server.arguments import check_names, command_line

_PORT_TAKEN = "address already in use"
_MAX_PORTS = 3
_LAUNCH = "rollout.server.launch"


class EngineError(RuntimeError):
    """The server did not start, or died; the message ends with the tail of its log."""


def resolve_device(device: str) -> str:
    """auto -> cuda where this process may use an NVIDIA device, else cpu."""
    if device != "auto":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    return "cuda" if visible and glob.glob("/dev/nvidia[0-9]*") else "cpu"


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def public_host(host: str) -> str:
    """The name under which other processes reach an interface."""
    return socket.gethostname() if host == "0.0.0.0" else host  # noqa: S104


class EngineProcess:
    """A running SGLang server. Use as a context manager, or call stop()."""

    def __init__(
        self, *, config: EngineConfig, model_path: str, api_key: str, log_path: Path, index: int = 0
    ) -> None:
        if errors := check_names(config.args):
            raise ValueError("; ".join(errors))
        if not Path(model_path, "config.json").is_file():
            raise ValueError(f"model.hf_path={model_path!r}: holds no config.json")
        self.config = config
        self.model_path = model_path
        self.api_key = api_key
        self.log_path = log_path
        self.name = f"engine_{index}"
        self.device = resolve_device(config.device)
        self.url = ""
        self.port = 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "EngineProcess":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> str:
        """Start the server, wait until it takes requests, return its URL.

        EngineError with the tail of the log when it dies or needs longer than start_timeout_s.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        for _ in range(_MAX_PORTS):
            port = free_port(self.config.host)
            self._spawn(port)
            try:
                self._wait_ready(deadline)
                return self.url
            except EngineError as error:
                self.stop()
                # Somebody took the port between our look and the server's bind.
                if _PORT_TAKEN not in str(error).lower():
                    raise
            except BaseException:
                self.stop()
                raise
        raise EngineError(f"{self.name}: {_MAX_PORTS} free ports in a row were taken by others")

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the server and every process it started; harmless when there is none."""
        if self.process is not None:
            end_process_group(self.process, timeout_s)
            self.process = None

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        assert self.process is not None
        return self.process.wait()

    def arguments(self, port: int) -> dict[str, Any]:
        """Every SGLang argument of this server by its field name."""
        config = self.config
        arguments: dict[str, Any] = {
            "model_path": self.model_path,
            "host": config.host,
            "port": port,
            "dtype": config.dtype,
            "tp_size": config.tp,
            "max_total_tokens": config.max_total_tokens,
            "max_running_requests": config.max_running_requests,
            "enable_deterministic_inference": config.deterministic,
            "weight_version": "0",
            "sleep_on_idle": True,
            "skip_server_warmup": True,
        }
        if self.device == "cpu":
            arguments |= {"device": "cpu", "attention_backend": "torch_native"}
        return arguments | config.args

    def environment(self) -> dict[str, str]:
        """The server's environment variables: ours and what it needs."""
        from rollout.server.launch import API_KEY

        environment = os.environ | {
            LAUNCHER_PID: str(os.getpid()),
            API_KEY: self.api_key,
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            cpus = sorted(os.sched_getaffinity(0))
            binding = "|".join(str(cpus[rank % len(cpus)]) for rank in range(self.config.tp))
            environment |= {
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TORCH_COMPILE_DISABLE": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": binding,
            }
        return environment

    def _spawn(self, port: int) -> None:
        self.port = port
        self.url = f"http://{public_host(self.config.host)}:{port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # SGLang prints its arguments, the key among them: the log is its owner's alone.
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_start = os.fstat(descriptor).st_size
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _LAUNCH, *command_line(self.arguments(port))],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def _wait_ready(self, deadline: float) -> None:
        assert self.process is not None
        while True:
            status = self.process.poll()
            if status is not None:
                raise EngineError(f"{self.name} ended with status {status}; {self.tail()}")
            if self._ready():
                return
            if time.monotonic() > deadline:
                limit = self.config.start_timeout_s
                raise EngineError(f"{self.name} took no requests within {limit:g} s; {self.tail()}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        host = "127.0.0.1" if self.config.host == "0.0.0.0" else self.config.host  # noqa: S104
        connection = http.client.HTTPConnection(host, self.port, timeout=3)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200 and self._listens()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _listens(self) -> bool:
        """Whether it is our server that answers on the port, not one that took it meanwhile."""
        assert self.process is not None
        try:
            server = psutil.Process(self.process.pid)
            sockets = [
                connection
                for process in [server, *server.children(recursive=True)]
                for connection in process.net_connections("tcp")
            ]
        except psutil.NoSuchProcess:
            return False
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
            for connection in sockets
        )

    def tail(self, num_lines: int = 15) -> str:
        """The last lines this server logged."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()[-num_lines:]
        return f"the end of {self.log_path}:\n" + "\n".join(lines)


def serve(run_dir: RunDir, index: int) -> int:
    """Run engine `index` of a run until it ends or is told to; the exit status."""
    run = load_rollout_run(run_dir.config)
    config = run.rollout.engine
    # Trainers push their weights; without them the engine serves what the run starts from.
    standalone = run.mode in ("rollout_only", "eval")
    model_path = (run.model.init_from if standalone else "") or run.model.hf_path
    role = f"engine_{index}"
    engine = EngineProcess(
        config=config,
        model_path=model_path,
        api_key=config.api_key or run_dir.token(),
        log_path=run_dir.log(role),
        index=index,
    )
    with engine:
        run_dir.write_address(role, engine.url)
        print(f"{role}: serving {model_path} at {engine.url}", flush=True)
        try:
            status = engine.wait()
        finally:
            run_dir.remove_address(role)
        raise EngineError(f"{role} ended with status {status}; {engine.tail()}")


def main() -> None:
    """`drivetrain-engine`: exit 0 when told to end, 1 when the server failed, 2 when refused."""
    parser = argparse.ArgumentParser(prog="drivetrain-engine", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--index", type=int, default=0)
    arguments = parser.parse_args()
    follow_launcher()

    def end(signum: int, frame: object) -> None:
        # Once only: a second signal must not interrupt the end of the server.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    run_dir = RunDir(arguments.run_dir)
    try:
        with run_dir.hold(f"engine_{arguments.index}"):
            serve(run_dir, arguments.index)
    except EngineError as error:
        sys.exit(f"drivetrain-engine: {error}")
    except ValueError as error:
        print(f"drivetrain-engine: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
