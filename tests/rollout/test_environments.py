import asyncio

import numpy as np
import pytest

from rollout.environments import ENVIRONMENTS
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


@pytest.mark.parametrize("family", ["chain_sum", "basic_arithmetic", "spell_backward"])
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
