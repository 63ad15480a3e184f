"""Starting whole runs through the command line, and reading what they left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

COMMON = [
    "experiment=smoke",
    "data.args.num_digits=3",
    "data.eval_num_prompts=32",
    "data.eval_temperature=0.0",
    "rollout.samples_per_prompt=8",
    "num_steps=6",
    "optimizer.lr=1e-3",
    "tracker.tensorboard=false",
]
TIMES = ("_s", "tokens_per_s", "peak_memory_bytes")


def drivetrain(*overrides: str, check: bool = True, timeout_s: float = 280):
    """Run the command as a user would; returns the finished process."""
    command = [str(Path(sys.executable).with_name("drivetrain")), *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ}
    )
    if check:
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The final policy."""
    return load_file(run_dir / "hf" / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
