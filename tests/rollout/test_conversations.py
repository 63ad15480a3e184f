"""Files of conversations as supervised samples: what is trained on, when, what is refused."""

import json
from pathlib import Path

import pytest

from rollout.config import DataConfig
from rollout.conversations import Conversations

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q0"},
    {"role": "assistant", "content": "a0"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
]


def conversations(path: Path, *records: object) -> Conversations:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Conversations(DataConfig(path=str(path)))


def test_the_assistants_turns_are_trained_on_and_nothing_else(chat, tmp_path):
    found = conversations(tmp_path / "a.jsonl", {"messages": TURNS, "id": 7})
    (sample,) = found.batch(chat, seed=0, start=0, count=1)
    sample.check()
    assert chat.text(sample.tokens) == "<bos>sq0a0<eos>q1a1<eos>"
    assert sample.prompt_length == 4
    assert sample.loss_mask.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert sample.turn_starts.tolist() == [0, 5]
    # The tokens are those of the whole conversation by the tokenizer's own template.
    whole = chat.tokenizer.apply_chat_template(TURNS, tokenize=True)["input_ids"]
    assert sample.tokens.tolist() == list(whole)


def test_every_record_comes_once_an_epoch_in_orders_of_their_own(chat, tmp_path):
    records = [{"prompt": f"{k}=", "completion": str(k)} for k in range(9)]
    found = conversations(tmp_path / "a.jsonl", *records)
    texts = [chat.text(sample.tokens) for sample in found.batch(chat, 3, 0, 18)]
    assert sorted(texts[:9]) == sorted(texts[9:]) == [f"<bos>{k}={k}<eos>" for k in range(9)]
    assert texts[:9] != texts[9:]
    # Any cut of the stream gives the same: a run may stop and go on anywhere.
    again = [chat.text(sample.tokens) for sample in found.batch(chat, 3, 5, 7)]
    assert again == texts[5:12]
    assert [chat.text(each.tokens) for each in found.batch(chat, 4, 0, 18)] != texts


BROKEN = [
    ([], "an object is wanted"),
    ({"prompt": "q"}, "found prompt; a line is"),
    ({"prompt": "q", "completion": ""}, "texts that are not empty"),
    ({"messages": []}, "a list of messages is wanted"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "a message is"),
    ({"messages": TURNS[:2]}, "messages of system, user; somebody else begins"),
    ({"messages": TURNS[2:3]}, "messages of assistant; somebody else begins"),
    ({"messages": [TURNS[1], TURNS[2], TURNS[2]]}, "never speaks twice in a row"),
]


@pytest.mark.parametrize(("record", "said"), BROKEN)
def test_a_malformed_line_is_refused_with_its_number(record, said, tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        conversations(path, {"messages": TURNS}, record)
    assert f"{path}:2: " in str(caught.value)
    assert said in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        Conversations(DataConfig(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="is empty"):
        conversations(tmp_path / "empty.jsonl")
    (tmp_path / "text.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match=r"text.jsonl:1: found hello, not JSON"):
        Conversations(DataConfig(path=str(tmp_path / "text.jsonl")))


def test_a_line_too_long_for_a_microbatch_is_named(chat, tmp_path):
    found = conversations(
        tmp_path / "a.jsonl", {"prompt": "q", "completion": "a"}, {"messages": TURNS}
    )
    found.check_lengths(chat, max_tokens=12, multiple=4)
    with pytest.raises(ValueError, match=r"a.jsonl:2: 12 tokens, more than batch.max_tokens"):
        found.check_lengths(chat, max_tokens=11, multiple=1)
