import inspect
from pathlib import Path
from typing import Any

import pytest

from rollout.config import DataConfig
from rollout.data import PromptStream, Split, demonstrations
from rollout.environments import ENVIRONMENTS
from rollout.environments.sort import SortEnvironment
from rollout.seeds import derive_seed
from rollout.tokens import Chat
from tests.rollout.fakes import ShownEnvironment


def identities(split: Split, count: int, seed: int = 0, **changes: Any) -> list[str]:
    stream = PromptStream(DataConfig(**changes), seed, split)
    return [stream.environments(k, 1)[0].identity() for k in range(count)]


def test_the_same_stream_again_and_from_any_position():
    first = identities("train", 20)
    assert identities("train", 20) == first
    assert identities("train", 20, seed=1) != first
    assert PromptStream(DataConfig(), 0, "train").environments(9, 1)[0].identity() == first[9]


def test_samples_of_a_group_share_their_initial_state():
    environments = PromptStream(DataConfig(), 0, "train").environments(5, 4)
    assert len({id(environment) for environment in environments}) == 4
    assert len({environment.identity() for environment in environments}) == 1


def test_evaluation_prompts_are_never_trained_on():
    small: dict[str, Any] = {
        "args": {"num_digits": 2}
    }  # 100 prompts: every split draws each many times
    held_out = set(identities("eval", 300, **small))
    assert held_out
    assert not held_out & set(identities("train", 1000, **small))
    assert not held_out & set(identities("sft", 1000, **small))


class ConstantEnvironment(SortEnvironment):
    def identity(self) -> str:
        return "always the same"


class SharedEnvironment(ConstantEnvironment):
    hold_out = False


def test_a_task_without_enough_prompts_says_so(monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "constant", ConstantEnvironment)
    monkeypatch.setitem(ENVIRONMENTS, "shared", SharedEnvironment)
    with pytest.raises(ValueError, match=r"too few different prompts"):
        _ = identities("train", 1, task="constant") + identities("eval", 1, task="constant")
    assert identities("train", 1, task="shared") == identities("eval", 1, task="shared")


def test_bad_arguments_of_a_task_are_named():
    with pytest.raises(ValueError, match=r"data.task=nosuch: .*sort"):
        PromptStream(DataConfig(task="nosuch"), 0, "train")
    with pytest.raises(ValueError, match=r"data.args=.* of data.task=sort.*digits"):
        identities("train", 1, args={"digits": 3})
    secrets = {"api_key": "sesame", "variables": {"TOKEN": "sesame"}}
    with pytest.raises(ValueError, match=r"data.args=.* of data.task=sort.*digits") as error:
        identities("train", 1, args={"digits": 3, **secrets})
    assert "sesame" not in str(error.value)
    with pytest.raises(ValueError, match=r"num_digits=0"):
        identities("train", 1, args={"num_digits": 0})
    with pytest.raises(ValueError, match=r"nosuch"):
        identities("train", 1, task="reasoning_gym", args={"family": "nosuch"})
    with pytest.raises(ValueError, match=r"min_termz"):
        identities("train", 1, task="reasoning_gym", args={"min_termz": 3})


@pytest.mark.parametrize(
    ("task", "args", "said"),
    [
        ("sort", {"num_digits": "many"}, "data.args.num_digits='many': data.task=sort wants int"),
        ("sort", {"num_digits": True}, "data.args.num_digits=True: data.task=sort wants int"),
        ("sort", {"num_digits": 2.5}, "data.args.num_digits=2.5: data.task=sort wants int"),
        ("bandit", {"good": "0.9"}, "data.args.good='0.9': data.task=bandit wants float"),
        ("mcp", {"api_key": 7}, "data.args.api_key='(left out)': data.task=mcp wants str"),
        ("sort", {"digits": 3}, "it takes num_digits: int = 8, varied_mistakes: bool = False"),
    ],
)
def test_an_argument_of_another_type_is_told_which_is_wanted(task, args, said):
    with pytest.raises(ValueError, match=r"data\.args") as error:
        PromptStream(DataConfig(task=task, args=args), 0, "train").environments(0, 1)
    assert said in str(error.value)


def test_a_whole_number_is_a_float():
    PromptStream(DataConfig(task="bandit", args={"good": 1}), 0, "train").environments(0, 1)


def test_demonstrations_are_the_answer_and_the_end_token(tiny_model_dir):
    chat = Chat.load(str(tiny_model_dir))
    samples = demonstrations(DataConfig(), chat.tokenizer, 0, 10, 3)
    assert [sample.group_id for sample in samples] == [10, 11, 12]
    assert (
        demonstrations(DataConfig(), chat.tokenizer, 0, 11, 1)[0].tokens.tolist()
        == samples[1].tokens.tolist()
    )
    for sample in samples:
        sample.check()
        response = sample.tokens[sample.prompt_length :]
        assert chat.text(response) == sample.metadata["answer"] + "<eos>"
        assert (
            chat.text(sample.tokens[: sample.prompt_length]) == "<bos>" + sample.metadata["prompt"]
        )
        assert sample.loss_mask.all()
        assert sample.reward == 1.0
        assert not sample.rollout_logprobs.any()
        assert not sample.versions.any()


def test_a_demonstration_that_hangs_ends_with_the_reason(tiny_model_dir):
    tokenizer = Chat.load(str(tiny_model_dir)).tokenizer
    task = "tests.rollout.fakes.ShownEnvironment"
    (sample,) = demonstrations(DataConfig(task=task), tokenizer, 0, 0, 1)
    # One was made to see what it asks, one to be shown.
    assert (sample.reward, ShownEnvironment.ended) == (2.0, 2)
    data = DataConfig(task=task, args={"trouble": "hangs"}, timeout_s=0.2)
    with pytest.raises(ValueError, match=r"no answer .* within data\.timeout_s=0\.2"):
        demonstrations(data, tokenizer, 0, 0, 1)
    assert ShownEnvironment.ended == 4


def test_seeds_are_the_same_everywhere_and_differ_by_every_part():
    assert derive_seed(0, 1, 2, 3) == 796505337477680871
    seeds = {
        derive_seed(a, b, c, d)
        for a in range(3)
        for b in range(3)
        for c in range(3)
        for d in range(3)
    }
    assert len(seeds) == 81
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_the_readme_tells_every_argument_of_a_task_with_its_type():
    readme = (Path(__file__).parents[2] / "rollout" / "README.md").read_text()
    for name, kind in ENVIRONMENTS.items():
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` | `"))
        told = [each.partition(":")[0] for each in row.split("`")[3::2]]
        known = inspect.signature(kind).parameters
        named = [each.name for each in known.values() if each.kind != each.VAR_KEYWORD]
        assert told == [each for each in named if each != "seed"]
        for each in row.split("`")[3::2]:
            parameter = known[each.partition(":")[0]]
            wanted = getattr(parameter.annotation, "__name__", str(parameter.annotation))
            assert wanted in each or parameter.default is None, each
            default = parameter.default
            assert default in (None, parameter.empty) or each.endswith(f" = {default!r}"), each
