"""A black-box agent that knows only OpenAI's client: the calculator task with a loop of its own.

As a command it reads its task from stdin; `solve` is the same as a function.
"""

import json
import os
import sys
from typing import Any

from openai import AsyncOpenAI, OpenAI

from rollout.agents.black_box import AgentCall
from rollout.environments.arithmetic import evaluate

MAX_CALLS = 3


def note(base_url: str, reply: Any) -> None:
    """With AGENT_NOTES=file: what this client was told was sampled, a line a turn."""
    if path := os.environ.get("AGENT_NOTES"):
        told = [[each.token, each.logprob] for each in reply.choices[0].logprobs.content]
        with open(path, "a") as file:
            file.write(json.dumps({"base_url": base_url, "sampled": told}) + "\n")


def tool_result(said: str | None) -> str | None:
    """What the calculator says to a call `[expression]`; None: this was the answer."""
    if not said or not (said.startswith("[") and said.endswith("]")):
        return None
    try:
        return f"={evaluate(said[1:-1])}|"
    except ValueError:
        return "=error|"


async def solve(call: AgentCall) -> None:
    """One episode; the environment judges what was said."""
    async with AsyncOpenAI(base_url=call.base_url, api_key=call.api_key) as client:
        messages: list[Any] = list(call.messages)
        for _ in range(MAX_CALLS + 1):
            reply = await client.chat.completions.create(
                model="policy", messages=messages, logprobs=True
            )
            message = reply.choices[0].message
            note(call.base_url, reply)
            messages.append(message.model_dump(exclude_none=True))
            result = tool_result(message.content)
            if result is None or reply.choices[0].finish_reason == "length":
                return
            messages.append({"role": "tool", "content": result, "tool_call_id": "0"})


def main() -> None:
    """The same in a process, by streams."""
    messages = json.load(sys.stdin)["messages"]
    with OpenAI() as client:
        for _ in range(MAX_CALLS + 1):
            stream = client.chat.completions.create(
                model="policy", messages=messages, stream=True, max_tokens=20
            )
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            messages.append({"role": "assistant", "content": said})
            result = tool_result(said)
            if result is None:
                return
            messages.append({"role": "tool", "content": result, "tool_call_id": "0"})


if __name__ == "__main__":
    main()
