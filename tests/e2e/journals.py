"""A journal without an engine: random samples of the tiny model's vocabulary."""

from pathlib import Path

import numpy as np

from rollout.batch import make_batch
from rollout.journal import write_step
from rollout.types import Group, Sample


def write_journal(rollouts: Path, *, num_steps: int, groups: int = 4, samples: int = 4) -> None:
    """`num_steps` batches for mode=train_only with gate.enabled=false; the same every time."""
    rollouts.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        members = [
            _group(rng, group_id=step * groups + k, version=step, count=samples)
            for k in range(groups)
        ]
        batch, flat = make_batch(step, members, 1.0)
        write_step(rollouts, batch, flat)


def _group(rng: np.random.Generator, *, group_id: int, version: int, count: int) -> Group:
    prompt = rng.integers(3, 60, size=int(rng.integers(4, 9)), dtype=np.int32)
    return Group(
        group_id=group_id,
        start_version=version,
        samples=[_sample(rng, prompt, group_id, index, version) for index in range(count)],
    )


def _sample(
    rng: np.random.Generator, prompt: np.ndarray, group_id: int, index: int, version: int
) -> Sample:
    length = int(rng.integers(2, 12))
    response = rng.integers(3, 60, size=length, dtype=np.int32)
    return Sample(
        group_id=group_id,
        index=index,
        tokens=np.concatenate([prompt, response]),
        prompt_length=len(prompt),
        loss_mask=np.ones(length, dtype=np.uint8),
        rollout_logprobs=-rng.random(length, dtype=np.float32) * 6,
        versions=np.full(length, version, dtype=np.int32),
        turn_starts=np.zeros(1, dtype=np.int32),
        reward=float(rng.integers(0, 2)),
    )
