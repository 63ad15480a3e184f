"""Sets of an evaluation: pass@k, several samples, results that say which version they are of."""

import json
from dataclasses import replace
from itertools import combinations

import pytest

from rollout.config import DataConfig, RolloutConfig, SamplingConfig
from rollout.data import PromptStream
from rollout.eval_sets import pass_at_k, read_sets
from rollout.evaluate import EvalSet
from rollout.rewards import GroupReward, Reward, Task
from rollout.seeds import derive_seed
from rollout.tokens import Transcript
from rollout.types import Sample
from tests.rollout.conftest import sorted_digits


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for n in range(1, 7):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                choices = list(combinations(samples, k))
                wanted = sum(any(choice) for choice in choices) / len(choices)
                assert pass_at_k(n, right, k) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        pass_at_k(2, 1, 3)


def make_sets(running, sets: dict, **data) -> None:
    """The evaluator of `running` measures these sets."""
    evaluator = running.service._evaluator
    generator = evaluator._sets[0].generator
    config = DataConfig(eval_num_prompts=5, **data)
    evaluator._sets = [
        EvalSet(
            settings=each, prompts=PromptStream(each.data, each.seed, "eval"), generator=generator
        )
        for each in read_sets(sets, config, RolloutConfig(), 0)
    ]


def test_sets_are_measured_beside_the_runs_own_and_recorded(running):
    """A policy that is right in every third episode of the set."""
    calls = 0

    def answer(text: str) -> str:
        nonlocal calls
        calls += 1
        return (
            sorted_digits(text) if len(text.removeprefix("<bos>")) == 9 or calls % 3 == 0 else "9"
        )

    running.client.answer = answer
    make_sets(
        running,
        {
            "short": {
                "task": "sort",
                "args": {"num_digits": 3},
                "num_prompts": 70,
                "samples_per_prompt": 4,
            }
        },
    )
    result = running.source().evaluate(0)
    assert (result.accuracy, result.num_prompts) == (1.0, 5)
    short = result.sets["short"]
    assert (short.num_prompts, short.samples_per_prompt) == (70, 4)
    assert short.accuracy == pytest.approx(1 / 3, abs=0.02)
    assert list(short.pass_at) == ["2", "4"]
    assert short.accuracy < short.pass_at["2"] <= short.pass_at["4"] <= 1.0
    (line,) = (running.rollouts / "eval.jsonl").read_text().splitlines()
    recorded = json.loads(line)
    assert recorded["version"] == 0
    assert recorded["sets"]["short"]["pass_at"] == short.pass_at
    running.service._evaluator._last = None  # as another process that takes its place
    assert running.source().evaluate(0) == result
    seeds = [seed for call in running.client.calls for seed in call]
    assert len(seeds) == len(set(seeds)) == 5 + 70 * 4


async def shortest(samples: list[Sample], tasks: list[Task]) -> list[Reward]:
    """1 for the shortest answers to a prompt."""
    lengths = [sample.response_length for sample in samples]
    return [Reward(value=float(n == min(lengths))) for n in lengths]


async def in_two(engine, task, sampling) -> list[Sample]:
    """An episode of two samples, of which the second is the shorter."""
    prompt = engine.chat.prompt(await task.initial_messages())
    generation = await engine.generate(prompt, sampling)
    samples = []
    for ids in (generation.token_ids, generation.token_ids[-1:]):
        transcript = Transcript(prompt)
        transcript.add_reply(ids.tolist(), [-0.5] * len(ids), [0] * len(ids))
        samples.append(task.sample(transcript))
    return samples


@pytest.mark.parametrize("play", [None, in_two])
def test_a_reward_of_groups_sees_all_samples_of_a_prompt_at_a_time(running, play):
    """70 prompts: more than one request. One answer in four is the shortest of its prompt."""
    calls = 0

    def answer(text: str) -> str:
        nonlocal calls
        calls += 1
        return "9" if calls % 4 == 3 else "99"

    asked = []

    async def reward(samples: list[Sample], tasks: list[Task]) -> list[Reward]:
        asked.append([sample.index for sample in samples])
        return await shortest(samples, tasks)

    running.client.answer = answer
    make_sets(running, {"best": {"num_prompts": 70, "samples_per_prompt": 4}})
    _, best = running.service._evaluator._sets
    best.generator = replace(best.generator, reward=GroupReward(reward), play=play)
    found = running.source().evaluate(0).sets["best"]
    assert (found.num_prompts, found.samples_per_prompt, found.failed_fraction) == (70, 4, 0.0)
    if play is None:
        assert asked == [[0, 1, 2, 3]] * 70
        assert found.accuracy == 1 / 4
        seeds = {seed for call in running.client.calls for seed in call}
        for index in range(70):
            assert derive_seed(best.settings.seed, "eval", index) in seeds
            assert derive_seed(best.settings.seed, "eval", index, 3) in seeds
    else:
        assert asked == [[0, 0, 1, 1, 2, 2, 3, 3]] * 70
        assert found.accuracy == 0.0  # of each episode the first counts, which is the longer


def test_domains_are_told_apart_and_make_up_the_whole(running):
    running.client.answer = lambda text: sorted_digits(text) if len(text) == 5 + 4 else "x"
    rows = {
        "three": {"task": "sort", "args": {"num_digits": 3}, "eval_num_prompts": 6},
        "five": {"task": "sort", "args": {"num_digits": 5}, "eval_num_prompts": 2},
    }
    make_sets(running, {}, mixture=rows)
    result = running.source().evaluate(0)
    assert {name: each.accuracy for name, each in result.sets.items()} == {
        "three": 1.0,
        "five": 0.0,
    }
    assert (result.accuracy, result.num_prompts) == (0.75, 8)


def test_all_of_a_file_is_measured_and_none_of_it_twice(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(f'{{"question": "q{k}", "answer": "{k}"}}\n' for k in range(9)))
    (_, bench) = read_sets(
        {"bench": {"task": "jsonl", "args": {"eval_path": str(path)}, "reward": "exact_match"}},
        DataConfig(),
        RolloutConfig(),
        0,
    )
    stream = PromptStream(bench.data, bench.seed, "eval")
    assert (bench.num_prompts, stream.num_prompts) == (0, 9)
    asked = {stream.environments(k, 1)[0].identity() for k in range(9)}
    assert len(asked) == 9


def test_a_set_without_a_task_has_the_runs_own():
    data = DataConfig(args={"num_digits": 4}, eval_num_prompts=30, eval_temperature=0.7)
    sampling = SamplingConfig(max_new_tokens=12)
    sets = {"greedy": {"sampling": {"temperature": 0.0}}, "wide": {"samples_per_prompt": 8}}
    _, greedy, wide = read_sets(sets, data, RolloutConfig(sampling=sampling), 0)
    assert greedy.data.args == {"num_digits": 4}
    assert (greedy.num_prompts, greedy.sampling.temperature) == (30, 0.0)
    assert (wide.sampling.temperature, wide.sampling.max_new_tokens) == (0.7, 12)
