"""What preferences teach, by the experiments whose targets these are; no server is needed."""

import pytest
from runs import drivetrain, metrics

pytestmark = [
    pytest.mark.nightly,  # whole runs: half a minute to three minutes each
    pytest.mark.timeout(900),
]


def evaluations(run_dir):
    return [row for row in metrics(run_dir) if "eval/accuracy" in row]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_makes_the_chosen_answer_less_likely_and_rpo_does_not(seed, tmp_path):
    dpo, rpo = tmp_path / "dpo", tmp_path / "rpo"
    drivetrain("experiment=dpo_displacement", f"seed={seed}", f"run_dir={dpo}", timeout_s=400)
    drivetrain(
        *("experiment=rpo_displacement", f"seed={seed}", f"run_dir={rpo}"),
        *("warm_start.num_steps=0", f"model.hf_path={dpo / 'tiny_model'}"),
        f"model.init_from={dpo / 'warm_start' / 'hf'}",
        timeout_s=400,
    )
    first, *_, last = evaluations(dpo)
    assert last["eval/accuracy"] >= 0.85
    assert last["eval/chosen_logprobs"] <= first["eval/chosen_logprobs"] - 0.2
    mended = evaluations(rpo)[-1]
    assert mended["eval/accuracy"] >= 0.85
    assert mended["eval/chosen_logprobs"] >= first["eval/chosen_logprobs"] + 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reward_model_tells_right_from_nearly_right(seed, tmp_path):
    run_dir = tmp_path / "rm"
    drivetrain("experiment=reward_model_sort", f"seed={seed}", f"run_dir={run_dir}", timeout_s=400)
    assert evaluations(run_dir)[-1]["eval/accuracy"] >= 0.88
