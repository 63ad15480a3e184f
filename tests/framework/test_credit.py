"""Where a sample's reward is earned: at the ends of the turns that the environment paid for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from framework.algorithm.critic import VALUE_ADVANTAGES
from framework.algorithm.running_std import RunningStd
from framework.config import ParallelConfig
from framework.megatron.credit import TokenCredit
from framework.megatron.microbatch import pack_microbatch
from framework.megatron.parallel import start_mesh, stop_mesh
from rollout.batch import make_batch
from rollout.types import Group, Sample
from tests.forked_ranks import run_ranks
from tests.rollout.test_wire import make_sample

MASK = [1, 1, 0, 1, 0, 0, 1, 1]
"""Three turns; the environment speaks between them."""
PAID = [0.25, 0.0, 1.0]
REWARD = 1.75
"""Of which .5 is beyond what the turns were paid for."""


def episode(**fields) -> Sample:
    mask = np.array(MASK, dtype=np.uint8)
    sample = make_sample(len(MASK), loss_mask=mask, reward=REWARD, **fields)
    sample.turn_starts = np.array([0, 3, 6], dtype=np.int32)
    sample.versions = np.where(mask, 0, -1).astype(np.int32)
    return sample


def credit(
    sample: Sample,
    name: str,
    tmp_path: Path,
    *,
    scale: RunningStd | None = None,
    norm: RunningStd | None = None,
    value: float = 0.0,
    **knobs: float,
) -> tuple[list[float], list[float]]:
    """[R] advantages of the response, and what the critic is to estimate; it says `value`."""
    found = tmp_path / "credit"

    def work(rank: int) -> None:
        mesh = start_mesh(ParallelConfig(), rank)
        zeros = {0: torch.zeros(len(MASK))}
        batch = pack_microbatch([0], {0: sample}, zeros, {0: 1.0}, mesh, sequence_parallel=False)
        batch.values = torch.full_like(batch.loss_mask, value)
        estimate = VALUE_ADVANTAGES[name].bind(knobs)
        tokens = TokenCredit(
            mesh=mesh, estimate=estimate, whiten=False, valued=True, scale=scale, norm=norm
        )
        step, _ = make_batch(0, [Group(group_id=7, start_version=0, samples=[sample])], 1.0)
        figures = tokens.assign([[batch]], step.samples)
        assert figures["train/value_mean"] == pytest.approx(
            value if norm is None else value * norm_before[1] + norm_before[0]
        )
        assert batch.returns is not None
        first = sample.prompt_length - 1
        here = slice(first, first + len(MASK))
        torch.save((batch.advantages[here].clone(), batch.returns[here].clone()), found)
        stop_mesh()

    norm_before = (norm.mean, norm.std) if norm is not None else (0.0, 1.0)

    run_ranks("credit", 1, work, tmp_path, 60.0)
    advantages, returns = torch.load(found)
    return advantages.tolist(), returns.tolist()


def test_a_token_gets_what_its_own_turn_and_later_ones_earn(tmp_path):
    sample = episode(turn_states=["a", "b", "c"], turn_rewards=PAID)
    found, _ = credit(sample, "gae", tmp_path)  # gamma = lam = 1: what is still to come
    assert found == pytest.approx([1.75, 1.75, 0, 1.5, 0, 0, 1.5, 1.5])
    # turn_gamma .5: turns return 1.5, .75 and .25 + .375
    found, _ = credit(sample, "bi_level_gae", tmp_path, turn_gamma=0.5)
    assert found == pytest.approx([0.625, 0.625, 0, 0.75, 0, 0, 1.5, 1.5])
    # A running spread divides all of it.
    seen = RunningStd()
    seen.add([1.75, -2.25])  # mean -.25, deviation 2; with this one's 1.75: sqrt(32 / 9)
    found, _ = credit(sample, "gae", tmp_path, scale=seen)
    spread = (32 / 9) ** 0.5
    assert found == pytest.approx([each / spread for each in [1.75, 1.75, 0, 1.5, 0, 0, 1.5, 1.5]])


def test_a_reward_of_no_turn_is_earned_at_the_last_token(tmp_path):
    found, _ = credit(episode(), "bi_level_gae", tmp_path, turn_gamma=0.5)
    assert found == pytest.approx([1.75 / 4, 1.75 / 4, 0, 1.75 / 2, 0, 0, 1.75, 1.75])


def test_a_critic_may_estimate_returns_of_mean_0_and_deviation_1(tmp_path):
    """Advantages are of returns as they are: a value is brought back by what was known before."""
    seen = RunningStd()
    seen.add([3.0, -1.0])  # mean 1, deviation 2: a value of .25 says 1.5
    sample = episode(turn_states=["a", "b", "c"], turn_rewards=PAID)
    found, returns = credit(sample, "gae", tmp_path, norm=seen, value=0.25)
    wanted = [1.75, 1.75, 0, 1.5, 0, 0, 1.5, 1.5]
    assert found == pytest.approx([each - 1.5 * bool(each) for each in wanted])
    every = torch.tensor([3.0, -1.0, 1.75, 1.75, 1.5, 1.5, 1.5])
    mean, deviation = every.mean().item(), every.std(correction=0).item()
    normal = [(each - mean) / deviation * bool(each) for each in wanted]
    assert returns == pytest.approx(normal, abs=1e-6)
