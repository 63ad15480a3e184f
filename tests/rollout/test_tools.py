"""Python functions as tools: their schemas, their calls, and a task that offers them."""

import asyncio
from typing import Literal

import pytest

from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.tools import Tools, find_tools, make_tool


def multiply(a: int, b: int = 2, *, unit: Literal["m", "s"] | None = None) -> str:
    """The product of two
    numbers.

    More about it.
    """
    return f"{a * b}{unit or ''}"


async def total(values: list[float]) -> float:
    """The sum."""
    if not values:
        raise LookupError("nothing to add")
    return sum(values)


def untyped(a, b: int) -> int:
    return b


def variadic(*values: int) -> int:
    return sum(values)


def of_a_class(other: DataConfig) -> int:
    return 0


def of_nonsense(other: "asyncio.Task") -> int:
    return 0


def test_the_schema_says_what_the_signature_says():
    schema = make_tool(multiply).schema
    assert schema["name"] == "multiply"
    assert schema["description"] == "The product of two numbers."
    assert schema["parameters"]["required"] == ["a"]
    properties = schema["parameters"]["properties"]
    assert properties["a"] == {"type": "integer"}
    assert properties["unit"] == {"anyOf": [{"enum": ["m", "s"]}, {"type": "null"}]}
    assert make_tool(total).schema["parameters"]["properties"] == {
        "values": {"type": "array", "items": {"type": "number"}}
    }
    assert '"name": "total"' in Tools([multiply, total]).prompt()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "untyped, parameter a: has no type"),
        (variadic, "variadic, parameter values: is \\*args"),
        (of_a_class, "of_a_class, parameter other: .* is a class"),
        (of_nonsense, "of_nonsense, parameter other: .* has no JSON schema"),
    ],
)
def test_functions_that_cannot_be_tools_are_refused_by_their_parameter(function, said):
    with pytest.raises(ValueError, match=said):
        make_tool(function)
    with pytest.raises(ValueError, match=rf"data\.args\.tools=tests.*{said}"):
        find_tools((f"tests.rollout.test_tools.{function.__name__}",))


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


@pytest.mark.parametrize(
    ("reply", "results"),
    [
        ("no call", []),
        ("<tool_call>open", []),
        (call('\n{"name": "multiply", "arguments": {"a": 3, "unit": "m"}}\n'), ["6m"]),
        (call('{"name": "multiply", "arguments": {"a": 3, "b": 4}}') * 2, ["12", "12"]),
        (call('{"name": "total", "arguments": {"values": [1, 2.5]}}'), ["3.5"]),
        (call("multiply(3)"), ["error: no JSON"]),
        (call("[1]"), ["error: a name of multiply, total is wanted"]),
        (call('{"name": "divide"}'), ["error: a name of multiply, total is wanted"]),
        (call('{"name": ["multiply"]}'), ["error: a name of multiply, total is wanted"]),
        (call('{"name": "multiply"}'), ["error: Object missing required field `a`"]),
        (
            call('{"name": "multiply", "arguments": {"a": "3"}}'),
            ["error: Expected `int`, got `str`"],
        ),
        (
            call('{"name": "multiply", "arguments": {"a": 1, "c": 2}}'),
            ["error: .*unknown field `c`"],
        ),
        (call('{"name": "multiply", "arguments": [3]}'), ["error: Expected `object`"]),
        (call('{"name": "total", "arguments": {"values": []}}'), ["error: LookupError: nothing"]),
    ],
)
def test_calls_are_checked_and_what_is_wrong_is_told(reply, results):
    found = asyncio.run(Tools([multiply, total]).answer(reply))
    assert len(found) == len(results)
    for text, expected in zip(found, results, strict=True):
        assert text.startswith(expected) or (
            ".*" in expected and text.startswith("error: ") and expected.split(".*")[1] in text
        )


def test_questions_from_a_file_with_tools(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "3*4?", "answer": 12}\n')
    (tmp_path / "e.jsonl").write_text('{"question": "1*1?", "answer": 1}\n')
    args = {
        "path": str(tmp_path / "q.jsonl"),
        "eval_path": str(tmp_path / "e.jsonl"),
        "tools": ["tests.rollout.test_tools.multiply"],
    }
    (environment,) = PromptStream(DataConfig(task="jsonl", args=args), 0, "train").environments(
        0, 1
    )
    step = asyncio.run(
        environment.step(call('{"name": "multiply", "arguments": {"a": 3, "b": 4}}'))
    )
    assert (step.done, step.messages) == (False, [{"role": "tool", "content": "12"}])
    first = asyncio.run(environment.initial_messages())
    assert first[0]["role"] == "system"
    assert "multiply" in first[0]["content"]
    assert asyncio.run(environment.step("12")).reward == 1.0
    with pytest.raises(ValueError, match=r"max_calls=0"):
        PromptStream(
            DataConfig(task="jsonl", args={**args, "max_calls": 0}), 0, "train"
        ).environments(0, 1)
