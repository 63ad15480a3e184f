import pytest

from rollout.environments.base import Message
from rollout.tokens import Chat


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def test_prompts_follow_the_chat_template(chat):
    assert chat.text(chat.prompt([user("31=")])) == "<bos>31="


def test_what_a_policy_may_sample_is_visible_in_the_text(chat):
    ids = [*chat.tokens("01"), chat.tokenizer.bos_token_id, 10_000, *chat.tokens("2")]
    assert chat.text(ids) == "01<bos>\ufffd2"
    assert chat.text([]) == ""


def test_later_turns_are_appended_without_retokenising(chat):
    first = chat.prompt([user("ab")])
    reply = [*chat.tokens("cd"), chat.end_id]
    more = chat.continuation([user("ef")], ended=True)
    whole = [user("ab"), {"role": "assistant", "content": "cd"}, user("ef")]
    assert first + reply + more == chat.prompt(whole)
    # A reply that was cut off gets the end token that the template puts there.
    assert chat.continuation([user("ef")], ended=False) == [chat.end_id, *more]


def test_continuation_with_a_chatml_template(chat):
    import copy

    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatml = Chat(tokenizer)
    first = chatml.prompt([user("ab")])
    reply = [*chatml.tokens("cd"), chatml.end_id]
    whole = [user("ab"), {"role": "assistant", "content": "cd"}, user("ef")]
    assert first + reply + chatml.continuation([user("ef")], ended=True) == chatml.prompt(whole)


def test_templates_that_cannot_be_continued_are_refused(chat):
    import copy

    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match=r"does not end an assistant message"):
        Chat(tokenizer).continuation([user("ef")], ended=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat_template"):
        Chat(tokenizer)
