"""One episode at the endpoint: chat requests in, token-exact trajectories out.

A request whose messages begin with a conversation that was had before goes on in its tokens: what
the policy sampled stays as it was sampled, and only the new messages are rendered and appended. A
request whose beginning changed (an edited history, a summary, a sub-agent, other tools) starts a
new segment with a prompt of its own. Each segment becomes one sample; every sampled token is in
exactly one of them.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from rollout.agents.engine import AgentTask, PolicyEngine
from rollout.agents.protocol import ChatRequest, Completion, parse_calls
from rollout.bodies import Refused
from rollout.config import SamplingConfig
from rollout.tokens import Transcript
from rollout.tools import tools_prompt
from rollout.types import Sample, Status

CONTEXT_SPENT = "context_length_exceeded"


@dataclass(kw_only=True, slots=True)
class _Segment:
    transcript: Transcript
    messages: list[dict[str, Any]] = field(default_factory=list)
    """All that its tokens say, normalised."""
    said: list[str] = field(default_factory=list)
    """The policy's own turns, as it sampled them."""
    tools: list[dict[str, Any]]
    ended: bool = True
    """The last reply carries its end token."""
    truncated: bool = False
    busy: bool = False
    """A request is being answered."""


class Session:
    """The recorder of one episode."""

    def __init__(self, id: str, engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig):
        self.id = id
        self.task = task
        self.sampling = sampling
        self.reported: float | None = None
        """The reward that the agent told."""
        self.context_spent = False
        self._engine = engine
        self._segments: list[_Segment] = []
        self._num_turns = 0
        self._answers: dict[bytes, asyncio.Task[Completion]] = {}
        """The newest for each request."""
        self._turns: set[asyncio.Task[Completion]] = set()

    async def complete(self, request: ChatRequest, *, repeated: bool) -> Completion:
        """The policy's next turn.

        repeated: the client sends a request again whose answer it did not get; it gets the same.

        Raises:
            Refused: the token budget of this conversation is spent.
            EngineFailure, EngineRefusal: as PolicyEngine.generate.
        """
        key = hashlib.blake2b(msgspec.json.encode((request.messages, request.tools))).digest()
        answer = self._answers.get(key) if repeated else None
        if answer is None:
            # A task of its own: a client that goes away may come back for what was sampled.
            answer = asyncio.create_task(self._turn(request))
            self._answers[key] = answer
            self._turns.add(answer)
            answer.add_done_callback(self._turns.discard)
        return await asyncio.shield(answer)

    async def _turn(self, request: ChatRequest) -> Completion:
        segment, observation = self._continued(request)
        if segment is None:
            prompt = self._prompt(request)
            segment = _Segment(transcript=Transcript(prompt), tools=request.tools)
            self._segments.append(segment)
        transcript = segment.transcript
        budget = self.sampling.max_new_tokens - transcript.response_length - len(observation)
        if budget < 1:
            self.context_spent = segment.truncated = True
            raise Refused(
                400,
                f"{CONTEXT_SPENT}: rollout.sampling.max_new_tokens="
                f"{self.sampling.max_new_tokens} tokens of this conversation are spent",
                param="messages",
            )
        sampling = replace(
            self.sampling,
            max_new_tokens=min(budget, request.max_tokens or budget),
            stop=[*self.sampling.stop, *request.stop],
        )
        segment.busy = True
        try:
            generation = await self._engine.generate(
                transcript.tokens + observation, sampling, routes_from=transcript.num_routes
            )
        finally:
            segment.busy = False
        num_prompt_tokens = len(transcript.tokens) + len(observation)
        if observation:
            transcript.add_observation(observation)
        transcript.add_reply(
            generation.token_ids.tolist(),
            generation.logprobs.tolist(),
            generation.versions.tolist(),
            routes=generation.routes,
        )
        segment.ended = generation.end_token
        segment.truncated = generation.finish == "length"
        self._num_turns += 1
        text = _before_stop(self._engine.text(generation), sampling.stop)
        content, calls = parse_calls(text) if request.tools else (text, [])
        completion = Completion(
            content=content,
            tool_calls=calls,
            finish="tool_calls" if calls else generation.finish,
            num_prompt_tokens=num_prompt_tokens,
            logprobs=[
                (self._engine.chat.text([token]), logprob)
                for token, logprob in zip(
                    generation.token_ids, generation.logprobs.tolist(), strict=True
                )
            ],
            number=self._num_turns,
        )
        segment.messages = [*request.messages, completion.message()]
        segment.said.append(text)
        return completion

    def _continued(self, request: ChatRequest) -> tuple[_Segment | None, list[int]]:
        """The segment that the request goes on with, and the tokens of the messages it adds."""
        best = None
        for segment in self._segments:
            had = segment.messages
            if segment.busy or not had or segment.tools != request.tools:
                continue
            if request.messages[: len(had)] == had and len(had) < len(request.messages):
                added = request.messages[len(had) :]
                if all(message["role"] != "assistant" for message in added):
                    best = max(best, segment, key=_num_messages) if best else segment
        if best is None:
            return None, []
        added, ended = request.messages[len(best.messages) :], best.ended
        return best, _rendered(lambda: self._engine.chat.continuation(added, ended=ended))

    def _prompt(self, request: ChatRequest) -> list[int]:
        chat, messages, tools = self._engine.chat, request.messages, request.tools or None
        if tools and not chat.knows("tools"):
            # The template cannot tell of them: the system message does.
            told = tools_prompt([tool["function"] for tool in tools])
            first = messages[0] if messages[0]["role"] == "system" else None
            system = f"{first['content']}\n\n{told}" if first else told
            messages = [{"role": "system", "content": system}, *messages[bool(first) :]]
            tools = None
        if not chat.knows("tool_calls"):
            messages = [_calls_as_text(message) for message in messages]
        tokens = _rendered(lambda: chat.prompt(messages, tools))
        if not tokens:
            raise Refused(400, "the messages have no tokens", param="messages")
        if self._engine.prompts is not None:
            try:
                self._engine.prompts.check(len(tokens))
            except ValueError as error:
                raise Refused(400, f"{CONTEXT_SPENT}: {error}", param="messages") from None
        return tokens

    def close(self) -> None:
        """No further answers."""
        for answer in self._turns:
            answer.cancel()

    def replies(self) -> list[str]:
        """What the policy said, turn by turn, in the first segment that has turns."""
        return next((segment.said for segment in self._segments if segment.said), [])

    def samples(self, reward: float) -> list[Sample]:
        """The segments in which something was sampled, each as a sample with this reward."""
        found = [segment for segment in self._segments if segment.messages]
        return [
            self.task.sample(
                segment.transcript,
                reward=reward,
                status=Status.TRUNCATED if segment.truncated else Status.STOPPED,
                metadata={"session": self.id, "segment": f"{k + 1} of {len(found)}"},
            )
            for k, segment in enumerate(found)
        ]


def _rendered(render: Callable[[], list[int]]) -> list[int]:
    try:
        return render()
    except Exception as error:  # a Jinja template that refuses: it may raise anything
        reason = f"the model's chat template refuses the messages: {error}"
        raise Refused(400, reason, param="messages") from None


def _num_messages(segment: _Segment) -> int:
    return len(segment.messages)


def _before_stop(text: str, stop: list[str]) -> str:
    places = [text.find(each) for each in stop if each in text]
    return text[: min(places)] if places else text


def _calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        f"<tool_call>\n{msgspec.json.encode(call['function']).decode()}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {"role": message["role"], "content": text}
