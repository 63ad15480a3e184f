"""What stage=preference refuses, by key."""

import copy
import functools
import json

import pytest

from framework.checks import check_config
from framework.compose import compose_config
from framework.preference_checks import is_paired, needs_reference

DPO = ["experiment=smoke", "stage=preference", "algorithm=dpo", "warm_start.num_steps=0"]


@functools.cache
def smoke():
    """Composing takes a quarter of a second, so this is done once."""
    return compose_config(DPO)


def errors_of(changes):
    """What is wrong with that run after `changes`, by dotted key."""
    config = copy.deepcopy(smoke())
    for key, value in changes.items():
        *sections, name = key.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    return check_config(config)


ARGS = "algorithm.loss_args"
BROKEN = [
    (
        {"algorithm.loss": "ppo_clip"},
        "algorithm.loss=ppo_clip: is for stage=rl; choose algorithm=dpo",
    ),
    ({"stage": "rl"}, "algorithm.loss=dpo: is for stage=preference; set"),
    (
        {"stage": "reward_model"},
        "algorithm.loss=dpo: is for stage=preference; choose algorithm=bra",
    ),
    ({"algorithm.loss": "bradley_terry"}, "is for stage=reward_model; choose algorithm=dpo"),
    ({"algorithm.loss": "dpoo"}, "algorithm.loss=dpoo: did you mean dpo?"),
    ({ARGS: {"gamma": 1}}, "algorithm.loss_args.gamma=1: algorithm.loss has no such knob"),
    ({ARGS: {"beta": 0}}, "algorithm.loss_args.beta=0: must be greater than 0"),
    (
        {"algorithm.loss": "cdpo", ARGS: {"label_smoothing": 0.5}},
        "label_smoothing=0.5: must be below 0.5",
    ),
    ({"algorithm.kl_coef": 0.1}, "algorithm.kl_coef=0.1: stage=preference: a reference"),
    ({"algorithm.entropy_coef": 0.1}, "algorithm.entropy_coef=0.1: stage=preference"),
    ({"algorithm.correction": "token"}, "algorithm.correction=token: stage=preference: no engine"),
    ({"algorithm.updates_per_step": 2}, "lower preference.batch_size instead; must be 1"),
    ({"preference.batch_size": 0}, "preference.batch_size=0: must be greater than 0"),
    (
        {"preference.batch_size": 1, "parallel.dp": 2},
        "preference.batch_size=1: fewer than parallel.dp=2",
    ),
    ({"algorithm.loss": "kto", "preference.batch_size": 1}, "batch_size=1: algorithm.loss=kto"),
    ({"mode": "eval"}, "mode=eval: stage=preference knows only mode=train"),
    ({"data.path": "/no/such.jsonl"}, "data.path: /no/such.jsonl: No such file"),
    ({"data.eval_path": "/no/such.jsonl"}, "data.eval_path=/no/such.jsonl: needs data.path"),
    (
        {"stage": "rl", "data.path": "/no/such"},
        "data.path=/no/such: only stages sft, preference, reward_model read it",
    ),
    (
        {"stage": "sft", "data.eval_path": "/no/such"},
        "data.eval_path=/no/such: only stages preference, reward_model read it",
    ),
    (
        {"data.path": "/no/such", "warm_start.num_steps": 10},
        "warm_start.num_steps=10: data.path has no demonstrations",
    ),
    (
        {"algorithm.loss": "simpo", ARGS: {}, "algorithm.reference": "/no/such"},
        "algorithm.reference=/no/such: algorithm.loss=simpo has no reference",
    ),
    ({"checkpoint.resume": "/no/such"}, "algorithm.loss=dpo: checkpoint.resume=/no/such begins"),
]


@pytest.mark.parametrize(("changes", "wanted"), BROKEN, ids=lambda value: str(value)[-40:])
def test_a_broken_choice_is_refused_by_key(changes, wanted):
    errors = errors_of(changes)
    assert any(wanted in error for error in errors), errors


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "rpo", "simpo", "orpo", "kto"])
def test_every_loss_can_be_chosen_by_its_name(name):
    config = compose_config([*DPO, f"algorithm={name}"])
    assert check_config(config) == []
    from framework.algorithm.preference import PREFERENCE_LOSSES

    row = PREFERENCE_LOSSES[name]
    assert (is_paired(config), needs_reference(config)) == (row.paired, row.reference)
    assert row.config(**config.algorithm.loss_args) == row.config()  # yaml and defaults agree


def test_a_malformed_file_is_refused_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(f'{json.dumps(good)}\n{{"prompt": "a"}}\n')
    (error,) = errors_of({"data.path": str(path)})
    assert f"data.path: {path}:2: found prompt, no 'chosen'" in error
    path.write_text(json.dumps(good) + "\n")
    (error,) = errors_of({"data.path": str(path)})
    assert "set data.eval_path" in error
    assert errors_of({"data.path": str(path), "data.eval_path": str(path)}) == []
