"""Questions and answers from a file of the user's own, one JSON object a line.

    {"question": "Natalia sold clips to 48 ...", "answer": "48 / 2 = 24 ... #### 72"}
    {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": 4}

Of an answer with `####` (GSM8K) the part behind it is what a reply is compared with, and the whole
is the demonstration. Other keys of a line are ignored.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rollout.datasets import as_jsonl
from rollout.environments.base import ROLES, Environment, EnvironmentStep, Message, is_message
from rollout.seeds import held_out
from rollout.tools import find_tools

_FINAL = "####"


@dataclass(kw_only=True, slots=True, frozen=True)
class _Row:
    line: int
    messages: tuple[tuple[str, str], ...]
    """(role, content)"""
    solution: str

    @property
    def identity(self) -> str:
        return json.dumps(self.messages)


class JsonlEnvironment(Environment):
    """One line of the file; reward 1 for a reply that is the answer, letter by letter.

    data.reward=math compares as mathematics instead.
    """

    def __init__(
        self,
        *,
        seed: int,
        path: str = "",
        eval_path: str = "",
        system: str = "",
        question_key: str = "question",
        answer_key: str = "answer",
        tools: Sequence[str] = (),
        max_calls: int = 4,
    ) -> None:
        """seed: which line, those of eval_path behind those of path. system: a message before every
        question. question_key, answer_key: what the file calls them. tools: functions of yours that
        the policy may call (package.module.function), in at most max_calls of its replies."""
        if max_calls < 1:
            raise ValueError(f"data.args.max_calls={max_calls}: must be at least 1")
        self._tools = find_tools(tuple(tools)) if tools else None
        self._calls_left = max_calls
        if self._tools:
            system = f"{system}\n\n{self._tools.prompt()}".strip()
        rows = _rows(path, eval_path, question_key, answer_key)
        row = rows[seed % len(rows)]
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = [*first, *({"role": r, "content": c} for r, c in row.messages)]
        self._row = row
        self.answer = row.solution.rpartition(_FINAL)[2].strip()

    @classmethod
    def finite(cls, split: str, **args: Any) -> list[int]:
        """Without eval_path an eighth of the questions is for evaluation, as for other tasks."""
        path, eval_path = args.get("path", ""), args.get("eval_path", "")
        keys = args.get("question_key", "question"), args.get("answer_key", "answer")
        rows = _rows(path, eval_path, *keys)
        if not eval_path:
            return [k for k, row in enumerate(rows) if held_out(row.identity) == (split == "eval")]
        num_train = len(_read("path", path, *keys)) if path else 0
        lines = {row.identity: row.line for row in rows[num_train:]}
        for row in rows[:num_train]:
            if row.identity in lines:
                raise ValueError(
                    f"{path}, line {row.line}: the same question is line {lines[row.identity]} of "
                    f"data.args.eval_path={eval_path}; what is evaluated is never trained on"
                )
        return list(range(num_train, len(rows)) if split == "eval" else range(num_train))

    async def initial_messages(self) -> list[Message]:
        """The question, or the conversation up to it."""
        return self._messages

    async def step(self, reply: str) -> EnvironmentStep:
        """A call of tools, or the answer."""
        results = await self._tools.answer(reply) if self._tools and self._calls_left else []
        if results:
            self._calls_left -= 1
            messages: list[Message] = [{"role": "tool", "content": text} for text in results]
            return EnvironmentStep(messages=messages, done=False)
        return EnvironmentStep(reward=float(reply.strip() == self.answer))

    def identity(self) -> str:
        """The question."""
        return self._row.identity

    def describe(self) -> dict[str, str]:
        """Question and answer."""
        return {"prompt": self._row.messages[-1][1], "answer": self.answer}

    def demonstration(self) -> list[str]:
        """The answer as the file has it."""
        return [self._row.solution]


@lru_cache(maxsize=8)
def _rows(path: str, eval_path: str, question_key: str, answer_key: str) -> list[_Row]:
    # A file of evaluations alone: of eval.sets.
    rows = [] if eval_path and not path else _read("path", path, question_key, answer_key)
    if not eval_path:
        return rows
    return [*rows, *_read("eval_path", eval_path, question_key, answer_key)]


@lru_cache(maxsize=8)
def _read(key: str, path: str, question_key: str, answer_key: str) -> list[_Row]:
    """All lines of a file; ValueError names the first that is wrong and counts the others."""
    if not path:
        raise ValueError("data.args.path: names no file; data.task=jsonl wants a .jsonl")
    try:
        lines = as_jsonl(path).read_bytes().splitlines()
    except ValueError as error:
        raise ValueError(f"data.args.{key}={error}") from error
    except OSError as error:
        raise ValueError(f"data.args.{key}={path}: {error.strerror or error}") from error
    if not lines:
        raise ValueError(f"data.args.{key}={path}: is empty")
    rows: list[_Row] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(number, line, question_key, answer_key))
        except ValueError as error:
            wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        more = f"; {len(wrong) - 1} more of its lines are wrong" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
    return rows


def _row(number: int, line: bytes, question_key: str, answer_key: str) -> _Row:
    """One line; ValueError says what was found and what would be right."""
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON object ({_shown(line)}): {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}; a JSON object is wanted")
    has_question = question_key in value
    if has_question == ("messages" in value):
        found = "both" if has_question else f"neither, but {_shown(list(value))}"
        raise ValueError(f"has {found}; either {question_key!r} or 'messages' is wanted")
    messages = (("user", value[question_key]),) if has_question else _messages(value["messages"])
    if not isinstance(messages[-1][1], str) or not messages[-1][1].strip():
        key = question_key if has_question else "messages"
        raise ValueError(f"{key!r} is {_shown(messages[-1][1])}; a text is wanted")
    if answer_key not in value:
        raise ValueError(f"has no {answer_key!r}, but {_shown(list(value))}")
    answer = value[answer_key]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{answer_key!r} is {_shown(answer)}; a text or a number is wanted")
    if not str(answer).rpartition(_FINAL)[2].strip():
        raise ValueError(f"{answer_key!r} is {_shown(answer)}: empty, or nothing after {_FINAL}")
    return _Row(line=number, messages=messages, solution=str(answer).strip())


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' is {_shown(value)}; a list of messages is wanted")
    for message in value:
        if not is_message(message):
            raise ValueError(
                f"'messages' holds {_shown(message)}; role ({', '.join(ROLES)}) and content, a "
                "text, are wanted"
            )
    if value[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"'messages' ends with {_shown(value[-1])}; the policy answers a user")
    return tuple((message["role"], message["content"]) for message in value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
