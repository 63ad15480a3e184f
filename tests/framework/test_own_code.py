"""A reward and a task of the user's own, by dotted path."""

import asyncio
from pathlib import Path

import pytest

from framework.checks import check_config
from framework.compose import compose_config
from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.rewards import Task, find_reward
from rollout.types import Sample

MODULE = """
from rollout.environments.base import Environment, EnvironmentStep
from rollout.rewards import Reward

async def length(sample, task):
    return Reward(value=float(len(task.replies[-1])))

def at_once(sample, task):
    return Reward(value=1.0)

async def of_three(sample, task, more):
    return Reward(value=1.0)

class Echo(Environment):
    def __init__(self, *, seed, word="a"):
        self.prompt = f"{word}{seed}"
    async def initial_messages(self):
        return [{"role": "user", "content": self.prompt}]
    async def step(self, reply):
        return EnvironmentStep(reward=float(reply == self.prompt))
    def identity(self):
        return self.prompt

class Half(Echo.__base__):
    def identity(self):
        return ""
"""
BROKEN = [
    ("data.reward=own_tasks.at_once", "is not an `async def` of (sample, task)"),
    ("data.reward=own_tasks.of_three", "is not an `async def` of (sample, task)"),
    ("data.reward=own_tasks.nosuch", "own_tasks has no nosuch"),
    ("data.reward=no_module.length", "No module named 'no_module'; is the directory"),
    ("data.reward=own_broken.length", "NameError: name 'undefined' is not defined"),
    ("data.task=own_tasks.length", "is no subclass of"),
    ("data.task=own_tasks.Half", "lacks __init__, initial_messages, step"),
    ("data.task=own_tasks.Nosuch", "own_tasks has no Nosuch"),
]


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own_tasks` and `own_broken` can be imported."""
    (tmp_path / "own_tasks.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("x = 1\ny = undefined\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_reward_and_a_task_of_ones_own():
    line = ["data.reward=own_tasks.length", "data.task=own_tasks.Echo", "data.args.word=go"]
    config = compose_config(["experiment=smoke", "warm_start.num_steps=0", *line])
    assert check_config(config) == []
    (episode,) = PromptStream(config.data, 0, "train").environments(0, 1)
    assert episode.identity().startswith("go")
    task = Task(description={}, replies=["four"], environment_reward=0.0)
    sample = Sample.__new__(Sample)  # this reward does not look at it
    assert asyncio.run(find_reward(config.data.reward)(sample, task)).value == 4.0


@pytest.mark.parametrize(("override", "wanted"), BROKEN)
def test_what_cannot_be_used_is_refused_in_one_line(override: str, wanted: str):
    (error,) = check_config(
        compose_config(["experiment=smoke", "warm_start.num_steps=0", override])
    )
    assert error.startswith(f"{override}: ")
    assert wanted in error


def test_a_bad_argument_of_ones_own_task_is_named():
    with pytest.raises(ValueError, match=r"wrd.*own_tasks\.Echo"):
        PromptStream(
            DataConfig(task="own_tasks.Echo", args={"wrd": "go"}), 0, "train"
        ).environments(0, 1)


def test_a_reward_that_needs_an_answer_is_refused_for_a_task_without_one():
    line = ["data.task=own_tasks.Echo", "data.reward=exact_match", "warm_start.num_steps=0"]
    (error,) = check_config(compose_config(["experiment=smoke", *line]))
    assert error.startswith("data.reward=exact_match: compares with an answer, but data.task=own_t")
