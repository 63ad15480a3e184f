"""What is refused of models beside the policy, and where their servers are placed."""

import copy
import functools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from framework.checks import check_config
from framework.compose import compose_config
from framework.config import RunConfig
from framework.launch import slurm
from framework.launch.manual import command_lines
from framework.launch.prepare import resolve_stages
from framework.launch.roles import Restart, engine_roles, side_model_roles, trainer_role

SCORED = {"x": {"kind": "reward_model", "args": {"side_model": "score"}}}
JUDGED = {"x": {"kind": "judge", "args": {"side_model": "score", "template": "{reply}"}}}


@functools.cache
def _smoke() -> RunConfig:
    return compose_config(["experiment=smoke", "warm_start.num_steps=0"])


def config_with(side_models: dict[str, Any], rewards: dict[str, Any] | None = None) -> RunConfig:
    """The smoke run with these."""
    config = copy.deepcopy(_smoke())
    config.rollout.side_models, config.data.rewards = side_models, rewards or {}
    return config


@pytest.fixture(scope="module")
def reward_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stage=reward_model leaves one, as far as checks read it."""
    path = tmp_path_factory.mktemp("rm") / "hf"
    shutil.copytree(tiny_model_dir, path)
    _rewrite(path, architectures=["Qwen3ForSequenceClassification"], id2label={"0": "LABEL_0"})
    return path


def _rewrite(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_a_reward_model_and_a_judge_of_their_kinds_are_accepted(
    reward_model_dir: Path, tiny_model_dir: Path
) -> None:
    score = {"kind": "classify", "model_path": str(reward_model_dir)}
    judge = {"model_path": str(tiny_model_dir), "args": {"context_length": 512}}
    assert check_config(config_with({"score": score}, SCORED)) == []
    assert check_config(config_with({"score": judge}, JUDGED)) == []


@pytest.mark.parametrize(
    ("row", "rewards", "named"),
    [
        ({"model_path": "/no/such"}, {}, "rollout.side_models.score.model_path=/no/such: no such"),
        ({"model_path": "TINY", "tp": 0}, {}, "rollout.side_models.score.tp=0"),
        ({"model_path": "TINY", "args": {"schedule_polici": 1}}, {}, "mean schedule_policy?"),
        ({"model_path": "TINY", "args": {"tp_size": 2}}, {}, "score.args.tp_size: use"),
        ({"model_path": "TINY", "kind": "classify"}, {}, "make one by stage=reward_model"),
        ({"model_path": "RM"}, {}, "has scores for text; kind=classify"),
        ({"model_path": "TINY"}, SCORED, "side_model=score: is of kind=generate; kind=classify"),
        ({"model_path": "RM", "kind": "classify"}, JUDGED, "kind=generate is wanted"),
    ],
)
def test_what_cannot_work_is_refused(
    row: dict[str, Any],
    rewards: dict[str, Any],
    named: str,
    tiny_model_dir: Path,
    reward_model_dir: Path,
) -> None:
    places = {"TINY": str(tiny_model_dir), "RM": str(reward_model_dir)}
    row = {**row, "model_path": places.get(row["model_path"], row["model_path"])}
    errors = check_config(config_with({"score": row}, rewards))
    assert len(errors) == 1, errors
    assert named in errors[0]


def test_a_name_that_nobody_has_is_refused() -> None:
    (error,) = check_config(config_with({}, SCORED))
    assert error.startswith("data.rewards.x.args.side_model=score: no such model in rollout.side")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "its head has 2 labels"),
        (
            {"architectures": ["Qwen3MoeForSequenceClassification"]},
            "SGLang does not serve Qwen3MoeForSequenceClassification",
        ),
    ],
)
def test_heads_that_no_server_would_answer_for(
    values: dict[str, Any], named: str, reward_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rm"
    shutil.copytree(reward_model_dir, path)
    _rewrite(path, **values)
    row = {"kind": "classify", "model_path": str(path)}
    (error,) = check_config(config_with({"score": row}, SCORED))
    assert named in error


def test_another_tokenizer_than_the_policys_is_refused(
    reward_model_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rm"
    shutil.copytree(reward_model_dir, path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["0"], tokens["1"] = tokens["1"], tokens["0"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = config_with({"score": {"kind": "classify", "model_path": str(path)}}, SCORED)
    assert not config.model.hf_path
    (error,) = check_config(config)
    assert "its tokenizer is not that of model.tiny, whose" in error
    config.model.hf_path = str(tiny_model_dir)
    (error,) = check_config(config)
    assert f"its tokenizer is not that of model.hf_path={tiny_model_dir}" in error


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ""),
        ({"rollout.teacher": ""}, "(its advantage is reverse_kl) compares with one; name a model"),
        ({"rollout.teacher": "other"}, "rollout.teacher=other: no such model"),
        ({"rollout.sampling.temperature": 0.7}, "temperature=0.7: a teacher's log-probs are"),
        (
            {"algorithm.advantage": "plain_reward"},
            "rollout.teacher=wise: algorithm.advantage=plain",
        ),
        ({"algorithm.advantage_args": {"max": 1}}, "advantage_args.max=1: algorithm.advantage has"),
        ({"rollout.filters": ["failed"]}, ""),
        (
            {"rollout.filters": ["failed", "dynamic_sampling"]},
            "rollout.filters=dynamic_sampling: chooses groups by rewards, which teach nothing",
        ),
        ({"rollout.keep_share": 0.5}, "rollout.keep_share=0.5: chooses groups by rewards, which"),
        ({"rollout.teacher_top_k": -1}, "rollout.teacher_top_k=-1: must not be negative"),
        (
            {"rollout.teacher_top_k": 3},
            "rollout.teacher_top_k=3: algorithm.loss=policy_gradient does not use them",
        ),
        ({"rollout.teacher_top_k": 69, "algorithm.loss": "generalized_jsd"}, ""),
        (
            {"rollout.teacher_top_k": 70, "algorithm.loss": "generalized_jsd"},
            "rollout.teacher_top_k=70: the vocabulary has 69 tokens; at most so many",
        ),
        (
            {"algorithm.loss": "generalized_jsd"},
            "rollout.teacher_top_k=0: algorithm.loss=generalized_jsd compares with the teacher's",
        ),
        (
            {
                "rollout.teacher_top_k": 3,
                "algorithm.loss": "generalized_jsd",
                "algorithm.loss_args": {"teacher_share": 1.5},
            },
            "algorithm.loss_args.teacher_share=1.5: must be in [0, 1]",
        ),
        (
            {
                "rollout.teacher": "",
                "rollout.teacher_top_k": 3,
                "algorithm.loss": "generalized_jsd",
                "algorithm.advantage": "plain_reward",
            },
            "algorithm.advantage=plain_reward: algorithm.loss=generalized_jsd uses no advantage",
        ),
    ],
)
def test_a_teacher_is_there_where_it_is_needed(
    fields: dict[str, Any], named: str, tiny_model_dir: Path
) -> None:
    config = config_with({"wise": {"model_path": str(tiny_model_dir)}})
    config.algorithm.advantage, config.algorithm.loss = "reverse_kl", "policy_gradient"
    config.algorithm.advantage_args, config.algorithm.loss_args = {}, {}
    config.rollout.teacher = "wise"
    for key, value in fields.items():
        *sections, name = key.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    errors = check_config(config)
    assert len(errors) == bool(named), errors
    assert all(named in error for error in errors)


def test_filters_of_a_mixtures_domains_choose_by_rewards_too(tiny_model_dir: Path) -> None:
    """A domain's own, and those of the run where it has none."""
    config = config_with({"wise": {"model_path": str(tiny_model_dir)}})
    config.algorithm.advantage, config.algorithm.loss = "reverse_kl", "policy_gradient"
    config.algorithm.advantage_args, config.algorithm.loss_args = {}, {}
    config.rollout.teacher = "wise"
    config.data.mixture = {"a": {"filters": ["failed", "dynamic_sampling"]}, "b": {}}
    said = "filters=dynamic_sampling: chooses groups by rewards, which teach nothing with"
    (error,) = check_config(config)
    assert error.startswith(f"data.mixture.a.{said} algorithm.advantage=reverse_kl")
    config.rollout.filters = ["dynamic_sampling"]
    config.data.mixture["a"] = {"filters": ["failed"]}
    (error,) = check_config(config)
    assert error.startswith(f"data.mixture.b.{said}")
    config.data.mixture["b"] = {"filters": []}
    assert check_config(config) == []


ROWS = "rollout.side_models={judge: {model_path: judge, tp: 2}, far: {url: 'http://h:1'}}"


def test_roles_are_started_with_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.launch.roles.visible_gpus", lambda: list("01234567"))
    config = resolve_stages(compose_config([ROWS, "parallel.dp=4", "rollout.engine.tp=2"])).main
    (role,) = side_model_roles(config)
    assert (role.name, role.restart, role.may_end) == ("side_judge", Restart.LOST, False)
    assert role.command[-2:] == ["--side-model", "judge"]
    assert role.address == Path(config.run_dir) / "addresses" / "side_judge.json"
    roles = [trainer_role(config), *engine_roles(config), role]
    devices = [each.env["CUDA_VISIBLE_DEVICES"] for each in roles if each is not None]
    assert devices == ["0,1,2,3", "4,5", "6,7"]
    assert config.rollout.side_models["judge"]["model_path"] == str(Path("judge").absolute())
    config.rollout.engine.colocated = True  # engines on the trainers' GPUs, side models not
    assert side_model_roles(config)[0].env["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize("overrides", [["mode=train_only"], ["rollout.address=http://a:1"]])
def test_who_generates_nothing_starts_none(overrides: list[str]) -> None:
    assert side_model_roles(compose_config([ROWS, *overrides])) == []


def test_the_other_launchers_know_them() -> None:
    stages = resolve_stages(
        compose_config(
            [
                *(ROWS, "cluster=slurm", "cluster.num_nodes=2", "cluster.engine_nodes=1"),
                *("rollout.engine.num_engines=2", "rollout.engine.tp=3", "run_dir=/shared/x"),
            ]
        )
    )
    command = "drivetrain-engine --run-dir /shared/x --side-model judge"
    assert command in command_lines(stages)
    script = slurm.render(stages)
    (step,) = [line for line in script.splitlines() if line.startswith("step side_")]
    words = shlex.split(step.rstrip("\\"))
    assert words[1:] == ["side_judge", "$RUN/logs/side_judge.log", "${ENGINE_NODES[0]}", "6,7"]
    assert f"    {command}\n" in script
    assert "    side_* | router) (($2 != 0 && $2 != 2)) ;;\n" in script
    assert "$name != engine_* && $name != side_* && $name != router" in script


def test_a_node_that_is_full_is_told(tiny_model_dir: Path) -> None:
    config = compose_config(
        [
            *("cluster=slurm", "cluster.num_nodes=2", "cluster.engine_nodes=1", "dry_run=true"),
            *("rollout.host=0.0.0.0", "rollout.engine.host=0.0.0.0", "cluster.gpus_per_node=2"),
        ]
    )
    judge = {"model_path": str(tiny_model_dir)}
    config.rollout.side_models = {"judge": judge}
    assert check_config(config) == []
    config.rollout.side_models = {"judge": judge, "other": judge}
    (error,) = check_config(config)
    assert error.startswith("cluster.gpus_per_node=2: with rollout.side_models.other a node would")
