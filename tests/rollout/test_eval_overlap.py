"""What is evaluated is never trained on, whichever domain or set reads it, and from which file."""

import json
import time

import pytest

from framework.checks import check_config
from framework.compose import compose_config
from rollout.config import DataConfig, RolloutConfig
from rollout.eval_overlap import check_overlap


def write(path, *questions: str) -> str:
    lines = [json.dumps({"question": each, "answer": 1}) for each in questions]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    asked = {"a": ["a1", "a2", "both"], "b": ["b1"], "aime": ["x1", "x2"], "leaked": ["x3", "both"]}
    return {name: write(tmp_path / f"{name}.jsonl", *each) for name, each in asked.items()}


def mixture(files: dict[str, str], of_b: str = "b") -> DataConfig:
    """Domain a evaluates file b2, domain b whatever `of_b` says."""
    of = {"a": ("a", "aime"), "b": ("b", of_b)}
    return DataConfig(
        mixture={
            name: {
                "weight": 1,
                "task": "jsonl",
                "args": {"path": files[train], "eval_path": files[evaluated]},
            }
            for name, (train, evaluated) in of.items()
        }
    )


def check(data: DataConfig, **sets: str) -> None:
    rows = {name: {"task": "jsonl", "args": {"eval_path": path}} for name, path in sets.items()}
    check_overlap(data, RolloutConfig(), rows, 0)


def test_prompts_are_compared_across_domains_and_sets(files):
    check(mixture(files, "aime"), aime=files["aime"])
    with pytest.raises(ValueError, match=r"^eval\.sets\.new: .*both.* data\.mixture\.a trains on"):
        check(mixture(files, "aime"), new=files["leaked"])
    with pytest.raises(ValueError, match=r"^data\.mixture\.b: .*both.* data\.mixture\.a trains"):
        check(mixture(files, "leaked"))
    one = DataConfig(task="jsonl", args={"path": files["a"], "eval_path": files["aime"]})
    check(one, aime=files["aime"])
    with pytest.raises(ValueError, match=r"^eval\.sets\.new: evaluates .*both.* data trains on"):
        check(one, new=files["leaked"])


def test_the_same_question_in_other_words_of_the_file_is_the_same(files, tmp_path):
    line = {"messages": [{"role": "user", "content": "both"}], "answer": "2", "source": "elsewhere"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(line) + "\n")
    one = DataConfig(task="jsonl", args={"path": files["a"], "eval_path": files["aime"]})
    with pytest.raises(ValueError, match=r"^eval\.sets\.chat: .*both"):
        check(one, chat=str(tmp_path / "chat.jsonl"))


def test_an_eighth_that_is_set_aside_is_so_in_every_domain(tmp_path):
    """Two domains and a set that read one file without eval_path: what it says decides."""
    path = write(tmp_path / "q.jsonl", *(f"q{k}" for k in range(60)))
    row = {"weight": 1, "task": "jsonl", "args": {"path": path}}
    check_overlap(
        DataConfig(mixture={"a": row, "b": row}),
        RolloutConfig(),
        {"all": {"task": "jsonl", "args": {"path": path}}},
        0,
    )


def test_a_run_is_refused_before_anything_starts(files):
    overrides = [
        "experiment=quickstart",
        "data=jsonl",
        f"data.args.path={files['a']}",
        f"data.args.eval_path={files['aime']}",
        "warm_start.num_steps=0",
        f"+eval.sets.new={{task:jsonl,args:{{eval_path:{files['leaked']}}}}}",
    ]
    errors = check_config(compose_config(overrides))
    assert [each for each in errors if each.startswith("eval.sets.new: evaluates")]


def test_large_files_are_compared_in_little_time(tmp_path):
    asked = [f"how much is {k} times {k + 1}?" for k in range(20_000)]
    train = write(tmp_path / "train.jsonl", *asked[:15_000])
    held_out = write(tmp_path / "eval.jsonl", *asked[15_000:])
    one = DataConfig(task="jsonl", args={"path": train, "eval_path": held_out})
    start = time.process_time()
    check(one, again=held_out)
    assert time.process_time() - start < 5
