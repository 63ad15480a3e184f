"""The experiments that promise to learn something: each reaches the targets that its yaml states.

nightly: whole trainings, two to ten minutes each on two cores. The shortest is the quickstart,
which scripts/quickstart.sh runs.
"""

from pathlib import Path

import pytest
from runs import drivetrain, metrics

from framework.compose import load_run_config
from rollout.journal import list_steps, read_step
from rollout.tokens import Chat
from rollout.types import Sample, Status

pytestmark = [
    pytest.mark.nightly,  # trainings of minutes
    pytest.mark.timeout(3600),
]


@pytest.mark.parametrize(
    "experiment",
    ["calculator", "calculator_lora", "calculator_ppo", "spell_backward", "frozen_lake", "guess"],
)
def test_an_experiment_reaches_its_targets(experiment: str, tmp_path: Path) -> None:
    run_dir = tmp_path / experiment
    done = drivetrain(f"experiment={experiment}", f"run_dir={run_dir}", timeout_s=3500)
    targets = load_run_config(run_dir).eval
    measured = [row["eval/accuracy"] for row in metrics(run_dir) if "eval/accuracy" in row]
    assert targets.target_accuracy or targets.target_gain
    assert measured[-1] >= targets.target_accuracy
    assert measured[-1] - measured[0] >= targets.target_gain
    assert "eval.target" not in done.stdout
    chat = Chat.load(str(run_dir / "tiny_model"))
    for path in list_steps(run_dir / "rollouts"):
        for sample in read_step(path)[1]:
            check_turns(chat, sample)


def check_turns(chat: Chat, sample: Sample) -> None:
    """The policy's turns begin where the journal says, are trained on, and end with its end token;
    nothing else is trained on."""
    mask = sample.loss_mask.tolist()
    starts = [k for k, written in enumerate(mask) if written and (k == 0 or not mask[k - 1])]
    assert sample.turn_starts.tolist() == starts
    response = sample.tokens[sample.prompt_length :]
    for start in starts[1:]:
        told = max(k for k in range(start) if mask[k]) + 1
        assert response[told - 1] == chat.end_id
        assert told < start, "the environment said something in between"
    if sample.status is Status.STOPPED:
        assert response[-1] == chat.end_id
    written = sample.loss_mask.astype(bool)
    assert (sample.versions[~written] == -1).all()
    assert not sample.rollout_logprobs[~written].any()
