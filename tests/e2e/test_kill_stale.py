"""`kill -9` while groups run ahead (staleness 2): no run is equal to another one then, but every
group is accounted for, none is older than its bound, and weights are what the journal makes."""

import asyncio
from pathlib import Path

import pytest
from runs import COMMON, drivetrain, largest_difference, metrics, weights

from rollout.config import load_rollout_run
from rollout.data import PromptStream
from rollout.journal import list_steps, read_entry
from rollout.run_dir import RunDir
from rollout.state import ProducerState
from rollout.tokens import Chat
from rollout.types import Sample
from rollout.wire import decode
from tests.e2e.test_kill import GROUPS_PER_STEP, SURVIVES, start, survive

STALENESS = 2
NUM_KILLS = 7
NUM_STEPS = 70
AHEAD = [
    f"rollout.max_staleness_steps={STALENESS}",
    "rollout.filters=[tests.rollout.fakes.odd_ids]",  # half of the groups are dropped
    "algorithm.entropy_coef=0.01",  # weights change whatever the rewards are
    "eval.at_start=false",
    "eval.at_end=false",
    f"num_steps={NUM_STEPS}",
]


def account(run_dir: Path) -> None:
    """After every step each group that ever started was trained once, was dropped, or is running;
    and nothing that is trained is older than the bound."""
    trained: list[int] = []
    dropped = oldest = 0
    entries = [read_entry(path) for path in list_steps(run_dir / "rollouts")]
    assert [entry.batch.step for entry in entries] == list(range(NUM_STEPS))
    for entry in entries:
        step, state = entry.batch.step, decode(entry.state, ProducerState).buffer.domains[""]
        trained += sorted({sample.group_id for sample in entry.samples})
        assert len(trained) == len(set(trained)) == (step + 1) * GROUPS_PER_STEP
        dropped += int(entry.batch.metrics.get("rollout/dropped/odd", 0))
        running = {
            each.first + k
            for each in state.started
            for k, there in enumerate(each.undelivered)
            if there
        }
        rest = set(range(state.num_started)) - set(trained) - running
        assert not running & set(trained)
        assert (len(rest), {group % 2 for group in rest}) == (dropped, {1}), f"step {step}"
        assert state.num_dropped == dropped
        for sample in entry.samples:
            written = sample.versions[sample.loss_mask.astype(bool)]
            assert step - STALENESS <= written.min() <= written.max() <= step
            oldest = max(oldest, step - int(written.min()))
    assert oldest, "nothing ran ahead: nothing was shown"
    print(f"{len(trained)} groups trained, {dropped} dropped, the oldest token {oldest} steps old")


def check_prompts(run_dir: Path) -> None:
    """Group k has the stream's k-th prompt and all of its samples, whatever died meanwhile."""
    run = load_rollout_run(RunDir(run_dir).config)
    stream, chat = PromptStream(run.data, run.seed, "train"), Chat.load(run.model.hf_path)
    for path in list_steps(run_dir / "rollouts"):
        groups: dict[int, list[Sample]] = {}
        for sample in read_entry(path).samples:
            groups.setdefault(sample.group_id, []).append(sample)
        for group_id, samples in groups.items():
            (environment,) = stream.environments(group_id, 1)
            prompt = chat.prompt(asyncio.run(environment.initial_messages()))
            assert [sample.index for sample in samples] == list(range(8))
            assert all(s.tokens[: s.prompt_length].tolist() == prompt for s in samples)


@pytest.mark.nightly  # 70 steps with 7 restarts, then the same steps from the journal: 3 minutes
@pytest.mark.timeout(1500)
def test_seven_kills_with_groups_ahead_lose_nothing(tmp_path):
    run = start(tmp_path / "killed", *AHEAD, "cluster.max_restarts=1000")
    survive(run, NUM_KILLS, NUM_STEPS, seed=11)
    account(run.run_dir)
    check_prompts(run.run_dir)
    logged = [row["step"] for row in metrics(run.run_dir) if "train/loss" in row]
    assert logged == list(range(1, NUM_STEPS + 1))
    replay = ["mode=train_only", f"replay_dir={run.run_dir / 'rollouts'}"]
    again = tmp_path / "again"
    drivetrain(*COMMON, *SURVIVES, *AHEAD, *replay, f"run_dir={again}", timeout_s=400)
    assert largest_difference(weights(run.run_dir), weights(again)) == 0.0
