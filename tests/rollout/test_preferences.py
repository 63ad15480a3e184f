"""Pairs and labelled answers, from the task and from files, and files that are refused by line."""

import json

import numpy as np
import pytest

from rollout.config import DataConfig
from rollout.environments import ENVIRONMENTS
from rollout.environments.sort import SortEnvironment
from rollout.preference_file import PreferenceFile
from rollout.preferences import open_preferences
from rollout.tokens import Chat


@pytest.fixture(scope="module")
def chat(tiny_model_dir):
    return Chat.load(str(tiny_model_dir))


def text(chat, sample, part):
    cut = sample.prompt_length
    return chat.text(sample.tokens[:cut] if part == "prompt" else sample.tokens[cut:])


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_task_pairs_are_the_answer_and_a_near_miss(chat):
    source = open_preferences(DataConfig(eval_num_prompts=4), chat, 0, paired=True)
    samples = source.batch(10, 3)
    assert [(each.group_id, each.index) for each in samples] == [
        (10, 0), (10, 1), (11, 0), (11, 1), (12, 0), (12, 1)
    ]  # fmt: skip
    for right, wrong in zip(samples[::2], samples[1::2], strict=True):
        right.check()
        wrong.check()
        assert (right.reward, wrong.reward) == (1.0, 0.0)
        prompt = text(chat, right, "prompt")
        assert prompt == text(chat, wrong, "prompt")
        digits = sorted(prompt.removeprefix("<bos>").removesuffix("="))
        assert text(chat, right, "answer") == "".join(digits) + "<eos>"
        assert (right.tokens != wrong.tokens).sum() == 1
    again = source.batch(11, 1)
    assert np.array_equal(again[1].tokens, samples[3].tokens)
    assert len(source.held_out()) == 8


class LenientEnvironment(SortEnvironment):
    async def step(self, reply):
        return (await super().step(self.answer)) if reply else None


def test_a_task_that_rewards_every_near_miss_is_refused(chat, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "lenient", LenientEnvironment)
    source = open_preferences(DataConfig(task="lenient"), chat, 0, paired=True)
    with pytest.raises(ValueError, match="LenientEnvironment: 16 draws of mistake"):
        source.batch(0, 1)


def test_labelled_answers_come_with_the_next_ones_answer(chat):
    samples = open_preferences(DataConfig(), chat, 0, paired=False).batch(0, 16)
    answers, unrelated = samples[::2], samples[1::2]
    assert {each.reward for each in answers} == {0.0, 1.0}
    for i, sample in enumerate(unrelated):
        sample.check()
        assert text(chat, sample, "prompt") == text(chat, answers[i], "prompt")
        assert text(chat, sample, "answer") == text(chat, answers[(i + 1) % 16], "answer")


def test_a_file_is_read_in_epochs_without_its_held_out_prompts(chat, tmp_path):
    records = [{"prompt": f"{i:03d}=", "chosen": "1", "rejected": "2"} for i in range(80)]
    data = DataConfig(path=write(tmp_path / "pairs.jsonl", records))
    source = open_preferences(data, chat, 0, paired=True)
    held_out = {text(chat, each, "prompt") for each in source.held_out()}
    size = 80 - len(held_out)
    assert 2 <= len(held_out) <= 20
    epochs = [[text(chat, each, "prompt") for each in source.batch(k * size, size)[::2]]
              for k in range(2)]  # fmt: skip
    assert set(epochs[0]) == set(epochs[1])
    assert len(set(epochs[0])) == size
    assert epochs[0] != epochs[1]
    assert not held_out & set(epochs[0])
    across = [text(chat, each, "prompt") for each in source.batch(size - 1, 2)[::2]]
    assert across == [epochs[0][-1], epochs[1][0]]
    other = DataConfig(path=data.path, eval_path=write(tmp_path / "eval.jsonl", records[:3]))
    both = open_preferences(other, chat, 0, paired=True)
    assert len(both.held_out()) == 6
    assert len({text(chat, each, "prompt") for each in both.batch(0, 80)}) == 80


def test_messages_of_several_turns_are_masked_by_who_wrote_them(chat, tmp_path):
    turns = [
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "c"},
    ]
    record = {
        "messages": [{"role": "user", "content": "x="}],
        "chosen": turns,
        "rejected": "d",
        "margin": 2,
        "score": 3,
    }
    path = write(tmp_path / "pairs.jsonl", [record])
    data = DataConfig(path=path, eval_path=path)
    chosen, rejected = open_preferences(data, chat, 0, paired=True).batch(0, 1)
    assert text(chat, chosen, "answer") == "ab<eos>noc<eos>"
    assert chosen.loss_mask.tolist() == [1, 1, 1, 0, 0, 1, 1]
    assert chosen.turn_starts.tolist() == [0, 5]
    assert text(chat, rejected, "answer") == "d<eos>"
    assert chosen.rewards == {"margin": 2.0}
    assert chosen.metadata["source"] == f"{path}:1"


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
MALFORMED = [
    ("{", True, r"found {, not JSON .*; \{\"prompt\""),
    ("", True, r"found an empty line, not JSON"),
    ([1], True, r"found \[1\]; an object is wanted"),
    ({"prompt": "a", "chosen": "b"}, True, r"found prompt, chosen, no 'rejected'; a line is"),
    ({"chosen": "b", "rejected": "c"}, True, r"found neither among chosen, rejected; one of"),
    ({**GOOD, "messages": []}, True, r"found prompt and messages; one of prompt and messages"),
    ({**GOOD, "prompt": ""}, True, r'prompt is ""; a list of messages or a text is wanted'),
    ({**GOOD, "prompt": 3}, True, r"prompt is 3; a list of messages or a text"),
    ({**GOOD, "chosen": "c"}, True, r"chosen and rejected are both c; two different"),
    ({**GOOD, "chosen": None}, True, r"chosen is null; a text, or messages from"),
    ({**GOOD, "rejected": [{"role": "user", "content": "x"}]}, True, r"has messages of user; a te"),
    (
        {**GOOD, "rejected": [{"role": "bot", "content": "x"}]},
        True,
        r"rejected holds .*role.*one of",
    ),
    ({**GOOD, "rejected": ["x"]}, True, r'rejected holds "?x"?; a message is'),
    (
        {"messages": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"},
        True,
        r"messages ends with an assistant's message",
    ),
    ({**GOOD, "margin": -1}, True, r"margin is -1; a number of at least 0"),
    (GOOD, False, r"found prompt, chosen, rejected, no 'completion'"),
    ({"prompt": "a", "completion": "b", "label": 1}, False, r"label is 1; true \(good\) or false"),
]


@pytest.mark.parametrize(("line", "paired", "wanted"), MALFORMED, ids=lambda value: str(value)[:30])
def test_a_malformed_line_is_named(line, paired, wanted, tmp_path):
    first = GOOD if paired else {"prompt": "a", "completion": "b", "label": False}
    path = tmp_path / "data.jsonl"
    last = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(first)}\n{last}\n")
    with pytest.raises(ValueError, match=rf"{path}:2: .*{wanted}"):
        PreferenceFile(path, paired=paired)


def test_many_malformed_lines_are_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("x\n" * 10)
    with pytest.raises(ValueError, match=r":1: .*:2: .*:3: .*; and 7 more malformed lines$"):
        PreferenceFile(path, paired=True)
    path.write_text("")
    with pytest.raises(ValueError, match=r"is empty; a line is"):
        PreferenceFile(path, paired=True)
    with pytest.raises(ValueError, match=r"none: No such file"):
        PreferenceFile(tmp_path / "none", paired=True)


class SometimesWrongEnvironment(SortEnvironment):
    """Half of its demonstrations are wrong, as those of tasks that show failures on purpose."""

    def demonstration(self):
        return super().demonstration() if int(self.prompt[0]) % 2 else ["x"]


def test_prompts_with_a_wrong_demonstration_are_passed_over(chat, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "sometimes", SometimesWrongEnvironment)
    source = open_preferences(DataConfig(task="sometimes"), chat, 0, paired=True)
    samples = source.batch(0, 12)
    assert [each.reward for each in samples] == [1.0, 0.0] * 12
    assert all(int(text(chat, each, "prompt")[len("<bos>")]) % 2 for each in samples)


def test_a_line_that_no_microbatch_holds_is_named_before_the_run(chat, tmp_path):
    records = [{"prompt": f"{k}{k}=", "chosen": "1", "rejected": "2"} for k in range(10, 60)]
    records[30] |= {"chosen": "1" * 40}
    data = DataConfig(path=write(tmp_path / "pairs.jsonl", records))
    source = open_preferences(data, chat, 0, paired=True)
    source.check_lengths(100, 1)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:31: .*batch.max_tokens_per_microbatch=40"):
        source.check_lengths(40, 1)


def test_an_unrelated_answer_is_one_to_another_prompt(chat, tmp_path):
    records = [
        {"prompt": f"{10 + k // 2}=", "completion": f"{k}", "label": k % 2 == 0} for k in range(400)
    ]
    data = DataConfig(path=write(tmp_path / "labelled.jsonl", records), eval_num_prompts=40)
    samples = open_preferences(data, chat, 0, paired=False).held_out()
    assert len(samples) == 80
    for answer, unrelated in zip(samples[::2], samples[1::2], strict=True):
        prompt = text(chat, answer, "prompt").removeprefix("<bos>")
        said = int(text(chat, unrelated, "answer").removesuffix("<eos>"))
        assert f"{10 + said // 2}=" != prompt
