"""Trainer ranks started by hand on a run directory: what torchrun would set, without its start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ENTRY = [sys.executable, "-m", "framework.train"]


def start_trainers(run_dir: Path, world_size: int) -> list[subprocess.Popen[bytes]]:
    """All ranks of a run whose directory has been written (cluster=manual)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        env = {name: str(value) for name, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with (run_dir / "logs" / f"rank_{rank}.log").open("ab") as log:
            ranks.append(
                subprocess.Popen(
                    [*ENTRY, "--run-dir", str(run_dir)],
                    env={**os.environ, **env},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def wait_trainers(ranks: list[subprocess.Popen[bytes]], timeout_s: float = 120) -> None:
    """Until all have ended well; none is left when they have not."""
    try:
        for process in ranks:
            assert process.wait(timeout=timeout_s) == 0
    finally:
        kill_trainers(ranks)


def kill_trainers(ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL to every rank."""
    for process in ranks:
        process.kill()
    for process in ranks:
        process.wait(timeout=30)
