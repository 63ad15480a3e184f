"""Composition: groups, overrides, the round trip through config.yaml, and help."""

import dataclasses
import re
from pathlib import Path

import pytest

from framework.algorithm.advantages import ADVANTAGES
from framework.algorithm.losses import LOSSES
from framework.checks import check_config
from framework.compose import (
    ConfigError,
    compose_config,
    config_yaml,
    file_mode,
    group_options,
    load_run_config,
    shown_yaml,
)
from framework.config import RunConfig
from framework.config_fields import ELSEWHERE, config_fields, nearest
from framework.help_text import help_text
from framework.notes import config_notes
from framework.objective import build_objective
from framework.preference_checks import preference_losses, reward_losses
from framework.preference_objective import build_preference_objective

ALGORITHMS = Path(__file__).parents[2] / "hydra_configs" / "algorithm"


def test_defaults_of_the_groups_are_those_of_the_dataclasses() -> None:
    """A default is said once: a group's first option must not contradict the field."""
    composed, plain = compose_config([]), RunConfig()
    for name in (
        "model",
        "parallel",
        "optimizer",
        "weight_sync",
        "cluster",
        "tracker",
    ):
        assert getattr(composed, name) == getattr(plain, name)
    assert composed.rollout == plain.rollout
    knobs = {"advantage_args": {}, "loss_args": {}}
    assert dataclasses.replace(composed.algorithm, **knobs) == plain.algorithm
    for table, kind in ((ADVANTAGES, "advantage"), (LOSSES, "loss")):
        row = table[getattr(plain.algorithm, kind)]
        assert row.config(**getattr(composed.algorithm, f"{kind}_args")) == row.config()


@pytest.mark.parametrize("path", sorted(ALGORITHMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_algorithm_composes_and_is_accepted(path: Path, tiny_model_dir: Path) -> None:
    config = compose_config([f"algorithm={path.stem}", "experiment=smoke"])
    stages = dict.fromkeys(preference_losses(), "preference")
    stages |= dict.fromkeys(reward_losses(), "reward_model")
    config.stage = stages.get(config.algorithm.loss, "rl")
    assert config.algorithm.name == path.stem
    if path.stem in ("on_policy_distillation", "gkd"):  # which nobody has a teacher for by default
        assert ["rollout.teacher" in error for error in check_config(config)] == [True]
        config.rollout.side_models = {"wise": {"model_path": str(tiny_model_dir)}}
        config.rollout.teacher = "wise"
    assert check_config(config) == []
    if config.stage == "preference":
        build_preference_objective(config)
    elif config.stage == "rl":
        assert build_objective(config).aggregation == config.algorithm.aggregation


def test_groups_experiments_and_overrides_take_precedence_in_this_order() -> None:
    config = compose_config(["experiment=quickstart", "parallel=tp2", "num_steps=3"])
    assert config.warm_start.num_steps > 0  # the experiment's
    assert (config.parallel.tp, config.parallel.dp) == (2, 1)  # the group given by hand
    assert config.num_steps == 3
    assert Path(config.run_dir) == Path.cwd() / "runs" / "quickstart"


def test_open_dicts_take_new_keys() -> None:
    config = compose_config(
        [
            "rollout.engine.args.chunked_prefill_size=512",
            "model.megatron.recompute_granularity=full",
            "data.args.num_digits=3",
        ]
    )
    assert config.rollout.engine.args == {"chunked_prefill_size": 512}
    assert config.model.megatron == {"recompute_granularity": "full"}
    assert config.data.args == {"num_digits": 3}


def test_arguments_go_with_what_they_belong_to() -> None:
    """grpo.yaml's clip_low is ppo_clip's; sort.yaml's num_digits is the sort task's."""

    def algorithm(*line: str) -> dict[str, object]:
        return compose_config(["algorithm=grpo", "data=sort", *line]).algorithm.loss_args

    assert algorithm("algorithm.loss_args.clip_low=0.1")["clip_high"] == 0.2
    assert algorithm("algorithm=dapo", "algorithm.loss=ppo_clip")["clip_high"] == 0.28  # its own
    assert algorithm("algorithm.loss=sapo", "num_steps=3", "name=clip_low") == {}
    assert algorithm("algorithm.loss=sapo") == {}
    knob = "temperature_positive"
    assert algorithm("algorithm.loss=sapo", f"algorithm.loss_args.{knob}=2") == {knob: 2}
    assert algorithm("algorithm.loss=sapo", f"algorithm.loss_args={{{knob}: 2}}") == {knob: 2}
    config = compose_config(["data=sort", "data.task=reasoning_gym", "data.args.family=chain_sum"])
    assert config.data.args == {"family": "chain_sum"}


def test_config_yaml_gives_back_the_same_run(tmp_path: Path) -> None:
    config = compose_config(["experiment=smoke", "rollout.sampling.stop=['a b', \"#\"]", "seed=7"])
    # A shell line is data: nothing in it may be taken for an interpolation when it is read.
    config = dataclasses.replace(
        config, cluster=dataclasses.replace(config.cluster, setup="cd ${HOME}\nsource $X/activate")
    )
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert load_run_config(tmp_path) == config


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("args", {"variables": {"TOKEN": "sesame", "EMPTY": ""}}),
        ("args", {"args": {"variables": {"TOKEN": "sesame"}}}),
        ("mixture", {"a": {"args": {"variables": {"TOKEN": "sesame"}}}}),
        ("rewards", {"x": {"args": {"headers": {"TOKEN": "sesame"}}}}),
        ("rewards", {"x": {"args": {"headers": ["TOKEN: sesame"]}}}),
        ("rewards", {"x": {"args": {"api_key": "sesame"}}}),
    ],
)
def test_secrets_are_its_owners_alone(section: str, values: dict, tmp_path: Path) -> None:
    """Kept for the run, where nobody else may read; left out of what is shown."""
    config = compose_config(["experiment=smoke"])
    assert file_mode(config) == 0o644
    setattr(config.data, section, values)
    assert file_mode(config) == 0o600
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert getattr(load_run_config(tmp_path).data, section) == values
    shown = shown_yaml(config)
    assert "sesame" not in shown
    assert "(left out)" in shown
    assert ("TOKEN: (left out)" in shown) == ("'TOKEN'" in str(values))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("num_stepz: 3\n", "num_stepz"),
        ("num_steps: many\n", "num_steps"),
        ("parallel: 3\n", "parallel"),
        ("- 1\n", "mapping"),
        ("a: [\n", "not YAML"),
    ],
)
def test_broken_config_yaml_is_refused_by_name(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as raised:
        load_run_config(tmp_path)
    assert str(tmp_path / "config.yaml") in str(raised.value)
    assert named in str(raised.value)


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        load_run_config(tmp_path)


def test_own_groups_come_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\nname: mine\noptimizer:\n  lr: 1.0e-3\n"
    )
    config = compose_config(["experiment=mine"], config_dir=str(tmp_path))
    assert (config.name, config.optimizer.lr) == ("mine", 1e-3)
    assert config.warm_start.num_steps > 0  # inherited
    assert check_config(config) == []
    assert "mine" in group_options(str(tmp_path))["experiment"]


def test_unknown_key_in_own_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    path.write_text("# @package _global_\nrollout:\n  max_stalenes_steps: 1\n")
    with pytest.raises(ConfigError, match=r"rollout\.max_stalenes_steps.*max_staleness_steps\?"):
        compose_config(["experiment=mine"], config_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("parallel.tensor", "parallel"),
        ("staleness", "rollout.max_staleness_steps"),
        ("optimizer.learning_rate", "optimizer"),
        ("temperature", "rollout.sampling.temperature"),
        ("rollout.temperature", "rollout.sampling.temperature"),
    ],
)
def test_nearest_key_is_a_sensible_one(typed: str, meant: str) -> None:
    assert (nearest(typed, config_fields()) or "").startswith(meant)


def test_help_lists_every_group_and_key() -> None:
    text = help_text()
    for group in group_options():
        assert f"  {group}=" in text
    for key in config_fields():
        assert f"  {key}=" in text


def test_every_option_of_every_group_composes() -> None:
    """A field that a yaml misspells is found here; one option of each group at a time."""
    groups = group_options()
    for k in range(max(len(options) for options in groups.values())):
        compose_config(
            [f"{group}={options[k % len(options)]}" for group, options in groups.items()]
        )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["rollout.max_staleness_steps=1"], ["rollout.max_staleness_steps=1"]),
        (["rollout.max_staleness_steps=1", "algorithm=decoupled_ppo"], []),
        (["experiment=qwen3_30b_a3b_16gpu", "optimizer.lr=2e-4"], ["optimizer.lr=0.0002"]),
        (["experiment=qwen3_30b_a3b_16gpu"], []),
        (["experiment=qwen3_30b_a3b_16gpu", "optimizer.lr=5e-5", "model.lora.rank=8"], []),
        (["optimizer.lr=1"], []),  # the tiny model bears much
        (["weight_sync.quantization=fp8_rounded"], ["weight_sync.quantization=fp8_rounded"]),
        (["weight_sync.quantization=fp8_rounded", "algorithm=tis"], []),
    ],
)
def test_what_is_seldom_meant_is_said(line: list[str], named: list[str]) -> None:
    notes = list(config_notes(compose_config(line)))
    assert [note.split(" ")[0].rstrip(":") for note in notes] == named


def test_a_dry_run_says_that_the_directory_is_taken(tmp_path: Path) -> None:
    line = ["dry_run=true", f"run_dir={tmp_path}"]
    assert not list(config_notes(compose_config(line)))
    (tmp_path / "config.yaml").touch()
    (note,) = config_notes(compose_config(line))
    assert note.startswith(f"run_dir={tmp_path}: already holds a run")
    assert not list(config_notes(compose_config([*line, "checkpoint.resume=auto"])))


def test_the_readme_names_every_experiment() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = text.partition("## Experiments\n")[2].partition("\n## ")[0]
    named = {word for word in table.split("`") if word.isidentifier()}
    assert named == set(group_options()["experiment"])


def test_a_missing_directory_says_which_experiment_makes_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "rlhf_sft"
    config = compose_config([f"model.hf_path={run_dir / 'tiny_model'}"])
    assert any("drivetrain experiment=rlhf_sft makes it" in line for line in check_config(config))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lr=1e-4", "did you mean optimizer.lr?"),
        ("steps=10", "did you mean num_steps?"),
        ("rollout.batch_size=8", "did you mean rollout.prompts_per_step?"),
        ("optimizer.lr=fast", "optimizer.lr=fast: float is wanted"),
    ],
)
def test_what_other_frameworks_call_it_is_told_by_our_name(typed: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_config([typed])


def test_other_frameworks_names_are_answered_by_keys_that_exist() -> None:
    assert set(ELSEWHERE.values()) <= set(config_fields())
