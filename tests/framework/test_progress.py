"""Figures on their way to a person: the files, the display and the last line."""

import io
import json
import math
from pathlib import Path

import pytest

from framework.compose import compose_config
from framework.finish import finish_run
from framework.metrics import MetricsLogger, MetricsReader
from framework.progress import ProgressView, RunHistory, format_duration
from rollout.run_dir import RunDir, write_atomic


def log_run(path: Path, num_steps: int) -> None:
    logger = MetricsLogger(path, tensorboard=False)
    logger.log(0, {"eval/accuracy": 0.25})
    for step in range(num_steps):
        figures = {"train/loss": 2.0 - step, "rollout/reward_mean": 0.5, "perf/step_time_s": 0.1}
        logger.log(step + 1, figures)
    logger.log(num_steps, {"eval/accuracy": 0.75})
    logger.close()


def test_every_line_is_json_even_when_a_figure_is_not_finite(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "perf/tokens": 3})
    # Read before it is closed: a run that dies has told what it knew.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "train/loss": None, "train/grad_norm": None, "perf/tokens": 3}
    assert json.loads(line) == expected
    logger.close()


@pytest.mark.parametrize("metrics", [{"step": 1}, {"a": "text"}, {"a": True}])
def test_what_is_no_figure_is_refused(metrics: dict, tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="metrics: "):
        logger.log(0, metrics)
    logger.close()


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, tensorboard=True)
    logger.log(3, {"train/loss": 0.5})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (3, 0.5)


def test_reader_waits_for_whole_lines_and_tells_each_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.poll() == []
    path.write_text('{"step": 1}\n{"step"')
    assert reader.poll() == [{"step": 1}]
    assert reader.poll() == []
    with path.open("a") as file:
        file.write(": 2}\n")
    assert reader.poll() == [{"step": 2}]
    write_atomic(path, b'{"step": 1}\n')  # trainers that go back drop what they will write anew
    assert reader.poll() == [{"step": 1}]
    assert reader.poll() == []


def test_plain_lines_tell_the_stages_and_figures(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ProgressView("demo", stream, live=False) as view:
        view.begin("train", RunDir(tmp_path), 3)
        view.tick()
        log_run(tmp_path, 3)
        view.tick()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "demo: train, 3 steps"
    assert "step 3/3" in lines[1]
    assert "reward 0.500" in lines[1]
    assert "held-out 0.750" in lines[1]
    assert "\x1b" not in stream.getvalue()


def test_live_display_shows_step_and_time_left(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ProgressView("demo", stream, live=True) as view:
        view.begin("train", RunDir(tmp_path), 4)
        log_run(tmp_path, 2)
        view.tick()
    assert "step 2/4" in stream.getvalue()
    assert "left" in stream.getvalue()
    assert "reward" in stream.getvalue()


def test_history_counts_steps_and_keeps_first_and_last(tmp_path: Path) -> None:
    history = RunHistory(RunDir(tmp_path), 5)
    log_run(tmp_path, 3)
    history.poll()
    assert history.steps_done == 3
    assert history.accuracies == [0.25, 0.75]
    assert history.losses == [2.0, 0.0]
    assert history.seconds_left is not None


def test_last_line_tells_accuracy_steps_seconds_and_where(tmp_path: Path) -> None:
    log_run(tmp_path, 3)
    config = compose_config([f"run_dir={tmp_path}", "tracker.report=false", "num_steps=3"])
    assert finish_run(config, 61.4) == (
        f"drivetrain: accuracy 0.250 -> 0.750, 3 steps, 61 s; run directory {tmp_path}"
    )


def test_what_makes_the_outcome_mean_less_is_said_before_it(tmp_path: Path) -> None:
    def last_lines(mode: str, uniform: float, *diffs: float) -> list[str]:
        run_dir = tmp_path / f"{mode}_{uniform}_{len(diffs)}"
        run_dir.mkdir()
        logger = MetricsLogger(run_dir, tensorboard=False)
        for step, diff in enumerate(diffs):
            figures = {"train/loss": 0.0, "train/rollout_logprob_abs_diff_max": diff}
            logger.log(step + 1, {**figures, "rollout/groups_uniform_fraction": uniform})
        logger.close()
        config = compose_config([f"run_dir={run_dir}", f"mode={mode}", "tracker.report=false"])
        return finish_run(config, 1.0).splitlines()

    assert len(last_lines("train", 0.5, 1e-6, 0.5)) == 1
    note, _ = last_lines("train", 1.0, 1e-6)
    assert "equal rewards in all steps" in note
    note, _ = last_lines("train_only", 0.5, 1e-6, 0.5, 3.0)
    assert "from step 2 on" in note
    assert "up to 3" in note


def test_a_target_that_was_missed_is_told(tmp_path: Path) -> None:
    log_run(tmp_path, 3)

    def notes(*line: str) -> list[str]:
        config = compose_config([f"run_dir={tmp_path}", "tracker.report=false", *line])
        return finish_run(config, 1.0).splitlines()[:-1]

    assert notes("eval.target_accuracy=0.75", "eval.target_gain=0.5") == []
    accuracy, gain = notes("eval.target_accuracy=0.8", "eval.target_gain=0.6")
    assert "accuracy 0.750 is below eval.target_accuracy=0.8" in accuracy
    assert "rose by 0.500, less than eval.target_gain=0.6" in gain


def test_report_that_cannot_be_written_is_told_and_the_run_stays_finished(tmp_path: Path) -> None:
    log_run(tmp_path, 3)
    line = finish_run(compose_config([f"run_dir={tmp_path}", "num_steps=3"]), 1.0)
    assert "accuracy 0.250 -> 0.750" in line
    assert "no report (" in line
    assert "config.yaml" in line


def test_durations_are_readable() -> None:
    assert format_duration(65.2) == "1:05"
    assert format_duration(7384) == "2:03:04"
