import asyncio
from fractions import Fraction

import numpy as np
import pytest

from rollout.environments import ENVIRONMENTS
from rollout.environments.arithmetic import evaluate
from rollout.rewards import REWARDS, Task
from rollout.types import Status
from tests.rollout.test_wire import make_sample


def play(environment, reply: str) -> float:
    step = asyncio.run(environment.step(reply))
    assert step.done
    return step.reward


def test_sort_pays_for_exactly_the_sorted_digits():
    environment = ENVIRONMENTS["sort"](seed=3)
    (message,) = asyncio.run(environment.initial_messages())
    digits = message["content"].removesuffix("=")
    assert len(digits) == 8
    answer = "".join(sorted(digits))
    assert environment.demonstration() == [answer]
    assert play(environment, answer) == 1.0
    for wrong in (answer + "0", answer[:-1], " " + answer, digits + "x", ""):
        assert play(environment, wrong) == 0.0


@pytest.mark.parametrize("family", ["chain_sum", "spell_backward", "gsm_symbolic"])
def test_reasoning_gym_families_score_with_their_own_verifier(family):
    kind = ENVIRONMENTS["reasoning_gym"]
    environment = kind(seed=11, family=family)
    again = kind(seed=11, family=family)
    assert environment.identity() == again.identity()
    assert environment.identity() != kind(seed=12, family=family).identity()
    (message,) = asyncio.run(environment.initial_messages())
    assert message["content"] == environment.describe()["prompt"]
    (answer,) = environment.demonstration()
    assert play(environment, answer) == 1.0
    assert play(environment, "no answer at all") < 0.5


def test_reasoning_gym_questions_for_character_models():
    arguments = {
        "family": "chain_sum",
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 1,
        "max_digits": 1,
    }
    environment = ENVIRONMENTS["reasoning_gym"](
        seed=1, question="expression", strip_spaces=True, suffix="=", **arguments
    )
    prompt = environment.describe()["prompt"]
    assert len(prompt) == 4
    assert play(environment, str(eval(prompt[:-1]))) == 1.0
    with pytest.raises(ValueError, match=r"question='nosuch'.*expression"):
        ENVIRONMENTS["reasoning_gym"](seed=1, question="nosuch", **arguments)


def reward(name: str, reply: str, answer: str | None, status: Status = Status.STOPPED) -> float:
    description = {} if answer is None else {"answer": answer}
    task = Task(description=description, replies=[reply], environment_reward=0.25)
    result = asyncio.run(REWARDS[name](make_sample(status=status), task))
    assert np.isfinite(result.value)
    assert result.components
    return result.value


def test_rewards():
    assert reward("environment", "", None) == 0.25
    assert reward("exact_match", " 12\n", "12") == 1.0
    assert reward("exact_match", "12", "12", Status.TRUNCATED) == 0.0
    assert reward("exact_match", "13", "12") == 0.0
    assert reward("math", "so it is \\boxed{\\frac{1}{2}}", "0.5") == 1.0
    assert reward("math", "\\boxed{2}", "0.5") == 0.0
    with pytest.raises(ValueError, match=r"has none"):
        reward("exact_match", "12", None)


def converse(environment, replies: list[str]) -> tuple[list[str], float, bool]:
    """What the environment said to each reply, the sum of rewards, and whether it ended."""

    async def talk() -> tuple[list[str], float, bool]:
        said, total, done = [], 0.0, False
        for reply in replies:
            assert not done
            step = await environment.step(reply)
            said.append("".join(message["content"] for message in step.messages))
            total, done = total + step.reward, step.done
        return said, total, done

    return asyncio.run(talk())


def test_the_calculator_is_called_and_then_the_answer_given():
    kind = ENVIRONMENTS["calculator"]
    environment = kind(seed=1)
    call, answer = environment.demonstration()
    said, reward, done = converse(environment, [call, answer])
    assert (said, reward, done) == ([f"={answer[1:]}|", ""], 1.0, True)
    assert eval(environment.describe()["prompt"][:-1]) == int(answer[1:])
    assert converse(kind(seed=1), [answer])[1] == 1.0  # the tool is an offer
    assert converse(kind(seed=1), ["[1/0]", "[2*(3+4)]", ":0"]) == (
        ["=error|", "=14|", ""],
        0.0,
        True,
    )
    assert converse(kind(seed=1), ["[1]", "[2]", "[3]", call])[2], "a fourth call ends it"
    for wrong in ("", answer[1:], answer + " ", call[:-1]):
        assert converse(kind(seed=1), [wrong])[1:] == (0.0, True)
    (guess,) = kind(seed=1, tool_share=0.0).demonstration()
    assert guess.startswith(":")


def test_expressions_are_computed_and_never_executed():
    assert evaluate("(12-7)*3/2") == Fraction(15, 2)
    for bad in ("", "2**9", "1/0", "()", "1+", "a", "0x1f", "1e3", "1" * 65, "1(2)", "1,2", "~1"):
        with pytest.raises(ValueError):
            evaluate(bad)


def test_guesses_are_told_where_the_number_is():
    kind = ENVIRONMENTS["guess"]
    environment = kind(seed=5)
    number = environment.number
    assert converse(environment, ["31", "0", str(number)]) == (["<", ">", ""], 1.0, True)
    assert converse(kind(seed=5, max_turns=2), ["31", "31"])[1:] == (0.0, True)
    for bad in ("", "x", "1_0", " 7", "-1", "9" * 12, "³"):
        assert converse(kind(seed=5), [bad])[1:] == (0.0, True)
    for seed in range(20):
        demonstration = kind(seed=seed).demonstration()
        _, reward, done = converse(kind(seed=seed), demonstration)
        assert done
        assert reward == float(int(demonstration[-1]) == kind(seed=seed).number)


def test_the_bandit_pays_per_turn_and_alike_in_every_sample():
    kind = ENVIRONMENTS["bandit"]
    best = kind(seed=2).best
    other = "ab".replace(best, "")
    first = converse(kind(seed=2), [best] * 6)
    assert first == converse(kind(seed=2), [best] * 6)
    paid = [converse(kind(seed=seed), [kind(seed=seed).best] * 6)[1] for seed in range(100)]
    assert 0.8 < np.mean(paid) < 1.0
    paid = [converse(kind(seed=seed), [other] * 6)[1] for seed in range(100)]
    assert 0.3 < np.mean(paid) < 0.7
    assert converse(kind(seed=2), [best, "c"])[2], "what is no arm ends it"


def test_frozen_lake_is_gymnasiums():
    kind = ENVIRONMENTS["frozen_lake"]
    for seed in range(10):
        moves = kind(seed=seed).demonstration()
        said, reward, done = converse(kind(seed=seed), moves)
        assert (reward, done) == (1.0, True)
        assert said[0] in ("01", "10")
    (rows, start) = kind(seed=0).prompt.rsplit("\n", 1)
    assert start == "00"
    assert [len(row) for row in rows.split("\n")] == [4] * 4
    assert (rows[0], rows[-1]) == ("s", "g")
    assert converse(kind(seed=0), ["x"])[1:] == (0.0, True)
    said, reward, done = converse(kind(seed=0), ["l"] * 8)
    assert (said, reward, done) == (["00"] * 7 + [""], 0.0, True)


def test_countdown_takes_any_right_expression():
    kind = ENVIRONMENTS["countdown"]
    for seed in range(20):
        assert play(kind(seed=seed), *kind(seed=seed).demonstration()) == 1.0
    environment = kind(seed=3)
    environment.numbers, environment.target = [3, 7, 12], 33
    for right in ("12+(3*7)", "3*7+12", "(7*3)+12"):
        assert play(environment, right) == 1.0
    for wrong in ("33", "12+21", "12+3*7+0", "12+(3*8)", "12+3*", "12+(3*7", "", "12+3*7/1"):
        assert play(environment, wrong) == 0.0


@pytest.mark.parametrize(
    ("task", "argument", "value"),
    [
        ("calculator", "num_digits", 0),
        ("calculator", "max_calls", 0),
        ("calculator", "tool_share", 1.5),
        ("guess", "num_values", 1),
        ("guess", "max_turns", 0),
        ("guess", "consistent_share", -0.1),
        ("bandit", "num_arms", 11),
        ("bandit", "num_pulls", 0),
        ("bandit", "good", 0.05),
        ("frozen_lake", "size", 1),
        ("frozen_lake", "frozen_share", 0.0),
        ("frozen_lake", "max_turns", 5),
        ("frozen_lake", "best_share", 2),
        ("countdown", "num_numbers", 1),
        ("countdown", "largest", 1),
        ("countdown", "max_target", 5),
    ],
)
def test_arguments_out_of_range_are_named(task, argument, value):
    with pytest.raises(ValueError, match=rf"data\.args\.{argument}={value}.*(must|wanted|away)"):
        ENVIRONMENTS[task](seed=0, **{argument: value})
