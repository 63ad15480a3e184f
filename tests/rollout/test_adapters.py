"""Environments of other people's: gymnasium's and textarena's, by their ids."""

import asyncio
import random
import sys
import time
from typing import ClassVar

import gymnasium
import pytest
from gymnasium.spaces import Discrete, MultiBinary, Text

from rollout.boundary import close_environment
from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.environments import Environment


def make(task: str, count: int = 1, index: int = 0, **args) -> list[Environment]:
    return PromptStream(DataConfig(task=task, args=args), 0, "train").environments(index, count)


def play(environment: Environment, replies: list[str]) -> tuple[list[str], list[float], bool]:
    """(what was said, rewards, over) of an episode."""

    async def main():
        said = [message["content"] for message in await environment.initial_messages()]
        rewards, done = [], False
        for reply in replies:
            assert not done
            step = await environment.step(reply)
            said += [message["content"] for message in step.messages]
            rewards.append(step.reward)
            done = step.done
        return said, rewards, done

    return asyncio.run(main())


class Adding(gymnasium.Env):
    """The sum of the actions, which ends at 3 with reward 1; other actions cost a tenth."""

    action_space = Discrete(3)
    observation_space = Discrete(100)

    closed: ClassVar[list[str]] = []
    """While which step each was closed."""

    def __init__(self, space: str = "discrete", step_s: float = 0.0) -> None:
        self.at = "rest"
        self.step_s = step_s
        if space == "text":
            self.action_space = Text(10)
        if space == "other":
            self.action_space = MultiBinary(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sum = 0
        return self.sum, {}

    def step(self, action):
        self.at = "step"
        time.sleep(self.step_s)
        self.at = "rest"
        self.sum += len(action) if isinstance(action, str) else action
        done = self.sum >= 3
        return self.sum, 1.0 if done else -0.1, done, False, {}

    def close(self):
        Adding.closed.append(self.at)
        if self.action_space == Text(10):
            raise OSError("cannot let go")


gymnasium.register("test/Adding-v0", entry_point=f"{__name__}:Adding", disable_env_checker=True)


def test_a_gymnasium_environment_is_a_conversation():
    (environment,) = make(
        "gymnasium", id="test/Adding-v0", actions=["no", "one", "two"], told="at {observation}"
    )
    assert play(environment, ["one", " two "]) == (["0", "at 1"], [-0.1, 1.0], True)
    assert play(environment, ["one", "three"]) == (["0", "at 1"], [-0.1, 0.0], True)
    (environment,) = make("gymnasium", id="test/Adding-v0", max_turns=2, invalid_reward=-1.0)
    assert play(environment, ["1", "1"]) == (["0", "1"], [-0.1, -0.1], True)
    assert play(environment, ["3"])[1] == [-1.0]
    (environment,) = make("gymnasium", id="test/Adding-v0", kwargs={"space": "text"})
    assert play(environment, ["abc"])[1] == [1.0]


def test_a_group_starts_alike_and_prompts_differ():
    first, second = make("gymnasium", count=2, id="Taxi-v4")
    assert play(first, ["0", "1"]) == play(second, ["0", "1"])
    firsts = {play(make("gymnasium", index=k, id="Taxi-v4")[0], [])[0][0] for k in range(5)}
    assert len(firsts) > 1


def test_a_slow_gymnasium_environment_leaves_the_others_alone():
    several = make("gymnasium", count=40, id="test/Adding-v0", kwargs={"step_s": 0.5})

    async def main() -> float:
        for environment in several:
            await environment.initial_messages()
        hung = [asyncio.create_task(environment.step("0")) for environment in several]
        await asyncio.sleep(0)
        start = time.monotonic()
        await asyncio.to_thread(int)  # the pool that everybody shares is free
        waited = time.monotonic() - start
        await asyncio.gather(*hung)
        return waited

    assert asyncio.run(main()) < 0.3


def wait_for(check) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_gymnasium_environment_is_closed_once_after_the_call_that_was_given_up(caplog):
    (environment,) = make("gymnasium", id="test/Adding-v0", kwargs={"step_s": 0.5})
    time.sleep(0.1)  # those that were drawn to see what they ask are closed as well
    Adding.closed.clear()

    async def main() -> None:
        await environment.initial_messages()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(environment.step("0"), 0.1)
        start = time.monotonic()
        close_environment(environment)
        close_environment(environment)
        assert time.monotonic() - start < 0.1

    asyncio.run(main())
    assert Adding.closed == []
    wait_for(lambda: Adding.closed)
    time.sleep(0.05)
    assert Adding.closed == ["rest"]
    (environment,) = make("gymnasium", id="test/Adding-v0", kwargs={"space": "text"})
    environment.close()
    wait_for(lambda: "test/Adding-v0.close: OSError: cannot let go" in caplog.text)


def test_a_textarena_game_is_closed_once_however_it_ends(monkeypatch):
    (over, given_up) = make("textarena", count=2, id="GuessTheNumber-v0")
    closed = []
    for environment in (over, given_up):
        game = environment._game  # pyright: ignore[reportAttributeAccessIssue]
        close = game.close
        monkeypatch.setattr(game, "close", lambda g=game, c=close: closed.append(g) or c())
    asyncio.run(play_to_the_end(over))
    over.close()
    given_up.close()
    given_up.close()
    wait_for(lambda: len(closed) == 2)
    time.sleep(0.05)
    assert len(closed) == len({id(game) for game in closed}) == 2


async def play_to_the_end(environment: Environment) -> None:
    for k in range(1, 30):
        if (await environment.step(f"[{k}]")).done:
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("task", "args", "said"),
    [
        ("gymnasium", {"id": "NoSuch-v9"}, "data.args.id=NoSuch-v9"),
        ("gymnasium", {"id": "test/Adding-v0", "actions": ["a"]}, "3 words are wanted"),
        ("gymnasium", {"id": "test/Adding-v0", "told": "{x}"}, "data.args.told='{x}'"),
        ("gymnasium", {"id": "test/Adding-v0", "max_turns": 0}, "max_turns=0"),
        ("gymnasium", {"id": "test/Adding-v0", "register": "no.such"}, "data.args.register=no"),
        (
            "gymnasium",
            {"id": "test/Adding-v0", "kwargs": {"space": "other"}},
            "Discrete or Text is wanted",
        ),
        ("textarena", {"id": "NoSuch-v9"}, "data.args.id=NoSuch-v9"),
        ("textarena", {"id": "TicTacToe-v0"}, "data.args.id=TicTacToe-v0: is no game of one"),
    ],
)
def test_what_cannot_be_played_is_refused_by_its_key(task, args, said):
    with pytest.raises(ValueError, match=said):
        make(task, **args)


@pytest.mark.parametrize("task", ["gymnasium", "textarena"])
def test_a_missing_package_is_one_line(task, monkeypatch):
    monkeypatch.setitem(sys.modules, task, None)
    with pytest.raises(ValueError, match=f"data.task={task} needs `pip install {task}`"):
        make(task, id="x")


def test_a_textarena_game_is_a_conversation():
    first, second = make("textarena", count=2, id="GuessTheNumber-v0")
    before = random.getstate()
    guesses = [f"[{k}]" for k in range(1, 11)]

    async def main(environment: Environment):
        said = [message["content"] for message in await environment.initial_messages()]
        rewards = []
        for guess in guesses:
            step = await environment.step(guess)
            rewards.append(step.reward)
            said += [message["content"] for message in step.messages]
            if step.done:
                break
        return said, rewards

    said, rewards = asyncio.run(main(first))
    assert "between 1 and 20" in said[0]
    assert said[1:2] in ([], ["The target number is higher."])
    assert asyncio.run(main(second)) == (said, rewards)
    assert random.getstate() == before
    outcomes = [
        asyncio.run(main(make("textarena", index=k, id="GuessTheNumber-v0")[0]))[1][-1]
        for k in range(8)
    ]
    assert max(outcomes) == 1.0
    assert min(outcomes) < 1.0


def test_sokoban_is_there():
    (environment,) = make("textarena", id="Sokoban-v0", max_turns=2)
    said, rewards, done = play(environment, ["[up]", "[left]"])
    assert "Sokoban" in said[0]
    assert len(said) == 2
    assert done
    assert rewards == [0.0, 0.0]
