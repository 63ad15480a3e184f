"""A teacher's log-probs: what is asked, what is taken, what is refused, and that they travel."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from framework.overlong import shorten_sample
from framework.tiny_model import _tokenizer
from rollout.batch import make_batch
from rollout.boundary import failed_sample
from rollout.client import EngineClient, EngineFailure
from rollout.config import EngineConfig, RolloutConfig
from rollout.journal import read_step, write_step
from rollout.run_dir import RunDir
from rollout.side_models import SideModels
from rollout.teacher import Teacher, open_teacher
from rollout.teacher_tokenizer import check_tokenizer, first_difference, probe_ids
from rollout.tokens import Chat
from rollout.types import Group, Sample, Status
from tests.rollout.test_rewards import Answers, serving


def make_sample(index: int = 0, **fields: Any) -> Sample:
    """Two prompt tokens; the policy wrote 5 and 7, somebody else 6."""
    sample = Sample(
        group_id=0,
        index=index,
        tokens=np.array([1, 2, 5, 6, 7], dtype=np.int32),
        prompt_length=2,
        loss_mask=np.array([1, 0, 1], dtype=np.uint8),
        rollout_logprobs=np.array([-1.0, 0.0, -2.0], dtype=np.float32),
        versions=np.array([0, -1, 0], dtype=np.int32),
        turn_starts=np.array([0, 2], dtype=np.int32),
        reward=1.0,
    )
    return replace(sample, **fields)


def reply(
    *rows: tuple[float | None, int], finish: Any = None, top: list[Any] | None = None
) -> dict[str, Any]:
    """As SGLang tells log-probs of a prompt: the first one is of nobody."""
    finish = finish or {"type": "length", "length": 0}
    scored = [[value, token, None] for value, token in rows]
    meta = {"finish_reason": finish, "input_token_logprobs": scored}
    return {"text": "", "meta_info": meta | ({} if top is None else {"input_top_logprobs": top})}


RIGHT = reply((None, 2), (-0.5, 5), (-9.0, 6), (-1.5, 7))


TOP = [
    None,
    [[-0.5, 5, None], [-1.0, 3, None]],
    [[-0.25, 3, None], [-2.0, 4, None]],
    [[-0.75, 9, None], [-1.5, 7, None]],
]


def score(answers: Answers, samples: list[Sample], top_k: int = 0) -> list[Sample]:
    """By a teacher that answers so."""

    async def run() -> list[Sample]:
        config = EngineConfig(max_retries=0, request_timeout_s=10)
        async with (
            serving(answers) as url,
            EngineClient([url], "key", config, what="rollout.teacher=wise") as client,
        ):
            return await Teacher(client, top_k).score(samples)

    return asyncio.run(run())


def test_every_sample_is_scored_from_its_own_tokens_in_one_call():
    answers = Answers((200, json.dumps([RIGHT, RIGHT])))
    failed = failed_sample(make_sample(1), "no reason")
    found = score(answers, [make_sample(), failed, make_sample(2)])
    assert [each.index for each in found] == [0, 1, 2]
    wanted = np.array([-0.5, 0.0, -1.5], dtype=np.float32)  # nothing where others wrote
    for sample in (found[0], found[2]):
        assert sample.teacher_logprobs is not None
        assert sample.teacher_logprobs.dtype == np.float32
        assert sample.teacher_logprobs.tolist() == wanted.tolist()
        sample.check()
    assert found[1].teacher_logprobs is not None
    assert not found[1].teacher_logprobs.any()
    (body,) = answers.bodies
    assert body["input_ids"] == [[1, 2, 5, 6, 7]] * 2
    assert body["logprob_start_len"] == [1, 1]
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
    assert "top_logprobs_num" not in body
    assert found[0].teacher_top_ids is None


class Narrow(Answers):
    """A teacher whose context is full with more than 5 tokens."""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if max(map(len, body["input_ids"])) > 5:
            return web.Response(status=400, text="too long for me")
        return web.json_response([RIGHT] * len(body["input_ids"]))


def test_what_the_teacher_does_not_take_costs_its_own_sample_only():
    long = make_sample(1)
    long.tokens = np.concatenate([long.tokens[:1], long.tokens])
    long.prompt_length += 1
    answers = Narrow()
    first, bad, last = score(answers, [make_sample(), long, make_sample(2)])
    assert [len(body["input_ids"]) for body in answers.bodies] == [3, 1, 1, 1]
    for sample in (first, last):
        assert sample.status is not Status.FAILED
        assert sample.teacher_logprobs is not None
        assert sample.teacher_logprobs.any()
    assert bad.status is Status.FAILED
    assert bad.metadata["error"].endswith("status 400: too long for me")
    assert bad.teacher_logprobs is not None
    bad.check()


def test_a_refusal_in_place_of_a_reply_is_one_too():
    refusal = {"type": "abort", "status_code": 400, "message": "too long"}
    (sample,) = score(Answers((200, json.dumps([reply(finish=refusal)]))), [make_sample()])
    assert sample.metadata["error"].endswith("the engine refuses the request: too long")


def test_the_likeliest_tokens_come_with_them_where_they_are_wanted():
    right = reply((None, 2), (-0.5, 5), (-9.0, 6), (-1.5, 7), top=TOP)
    answers = Answers((200, json.dumps([right])))
    found = score(answers, [failed_sample(make_sample(1), "no reason"), make_sample()], top_k=2)
    assert answers.bodies[0]["top_logprobs_num"] == [2]
    for sample, ids, logprobs in (
        (found[0], [[0, 0]] * 3, [[0.0, 0.0]] * 3),
        (found[1], [[5, 3], [3, 4], [9, 7]], [[-0.5, -1.0], [-0.25, -2.0], [-0.75, -1.5]]),
    ):
        sample.check()
        assert sample.teacher_top_ids is not None
        assert sample.teacher_top_ids.dtype == np.int32
        assert sample.teacher_top_ids.tolist() == ids
        assert sample.teacher_top_logprobs is not None
        assert sample.teacher_top_logprobs.dtype == np.float32
        assert sample.teacher_top_logprobs.tolist() == logprobs


@pytest.mark.parametrize(
    ("top", "said"),
    [
        (None, "not 2 likeliest tokens"),
        (TOP[1:3], "not 2 likeliest tokens"),
        ([None, TOP[1], [[-0.25, 3, None]], TOP[3]], "not 2 likeliest tokens"),
        ([None, TOP[1], None, TOP[3]], "not 2 likeliest tokens"),
        ([None, TOP[1], TOP[2], [[0.1, 9, None], [-1.5, 7, None]]], "likeliest token is not a"),
        ([None, TOP[1], TOP[2], [[None, 9, None], [-1.5, 7, None]]], "likeliest token is not a"),
        ([None, TOP[1], TOP[2], [[-0.1, 2**31, None], [-1.5, 7, None]]], r"2147483647 - at .*top"),
        ([None, TOP[1], TOP[2], [[-0.1, -1, None], [-1.5, 7, None]]], r">= 0 - at .*input_top"),
        ([None, TOP[1], TOP[2], [[-0.1, 7, None], [-1e39, 9, None]]], r"e\+38 - at .*input_top"),
        ([None, TOP[1], TOP[2], [[-0.1, 7, None], [-1.5, 7, None]]], "a token is told twice"),
    ],
)
def test_likeliest_tokens_that_do_not_fit_are_refused(top: Any, said: str):
    wrong = reply((None, 2), (-0.5, 5), (-9.0, 6), (-1.5, 7), top=top)
    with pytest.raises(
        EngineFailure, match=rf"^http://\S+: the engine's reply is refused: .*{said}"
    ):
        score(Answers((200, json.dumps([wrong]))), [make_sample()], top_k=2)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([RIGHT, RIGHT], "2 replies to 1 samples"),
        ([reply((None, 2), (-0.5, 5), (-1.0, 6), (-1.5, 8))], "not those of the 3 tokens"),
        ([reply((-0.5, 5), (-1.0, 6))], "not those of the 3 tokens"),
        ([reply((None, 5), (-1.0, 6), (-1.5, 7))], "not a number <= 0"),
        ([reply((None, 2), (0.5, 5), (-1.0, 6), (-1.5, 7))], "not a number <= 0"),
        (
            [reply((None, 2), (-1e39, 5), (-1.0, 6), (-1.5, 7))],
            r"e\+38 - at .*input_token_logprobs",
        ),
        ([{"text": ""}], "meta_info"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(answer: Any, said: str):
    with pytest.raises(EngineFailure, match=said):
        score(Answers((200, json.dumps(answer))), [make_sample()])


def test_a_teacher_that_is_busy_for_good_is_named():
    with pytest.raises(
        EngineFailure, match=r"^rollout.teacher=wise failed after 1 attempts: .*503"
    ):
        score(Answers((503, "busy")), [make_sample()])


def test_they_travel_to_the_trainers_and_are_cut_with_their_sample(tmp_path):
    scores = np.array([-0.5, 0.0, -1.5], dtype=np.float32)
    sample = make_sample(teacher_logprobs=scores)
    batch, samples = make_batch(0, [Group(group_id=0, start_version=0, samples=[sample])], 1.0)
    # Over the policy's two tokens: (-1 + .5 - 2 + 1.5) / 2.
    assert batch.metrics["rollout/teacher_kl"] == pytest.approx(-0.5)
    _, (read,) = read_step(write_step(tmp_path, batch, samples))
    assert read.teacher_logprobs is not None
    assert read.teacher_logprobs.tolist() == scores.tolist()
    shortened = shorten_sample(read, 1)
    assert shortened.teacher_logprobs is not None
    assert shortened.teacher_logprobs.tolist() == [-0.5]
    shortened.check()
    bare, _ = make_batch(0, [Group(group_id=0, start_version=0, samples=[make_sample()])], 1.0)
    assert "rollout/teacher_kl" not in bare.metrics
    top = {
        "teacher_top_ids": np.array([[5, 3], [3, 4], [9, 7]], dtype=np.int32),
        "teacher_top_logprobs": -np.arange(6, dtype=np.float32).reshape(3, 2),
    }
    batch, samples = make_batch(
        1, [Group(group_id=0, start_version=0, samples=[replace(sample, **top)])], 1.0
    )
    _, (read,) = read_step(write_step(tmp_path, batch, samples))
    shortened = shorten_sample(read, 1)
    shortened.check()
    assert shortened.teacher_top_ids is not None
    assert shortened.teacher_top_ids.tolist() == [[5, 3]]
    assert shortened.teacher_top_logprobs is not None
    assert shortened.teacher_top_logprobs.tolist() == [[0.0, -1.0]]
    failed_sample(read, "late").check()
    for wrong_top in (
        {"teacher_top_ids": None},
        {"teacher_top_ids": top["teacher_top_ids"][:2]},
        {name: values[:2] for name, values in top.items()},
        {"teacher_top_ids": -top["teacher_top_ids"]},
        {"teacher_top_logprobs": -top["teacher_top_logprobs"]},
    ):
        with pytest.raises(ValueError, match="teacher_top_"):
            replace(sample, **{**top, **wrong_top}).check()
    for wrong in (scores[:2], -scores, np.full(3, np.nan, dtype=np.float32)):
        with pytest.raises(ValueError, match="teacher_logprobs must be 3 finite numbers"):
            make_sample(teacher_logprobs=wrong).check()
    assert failed_sample(read, "late").status is Status.FAILED


def chat() -> Chat:
    return Chat(_tokenizer())


def test_a_teacher_of_another_tokenizer_is_refused_by_the_texts_of_its_tokens(caplog):
    """Two letters changed places there, at the same size."""

    def answer(*, swapped: bool) -> Answers:
        ids = probe_ids(chat().num_tokens)
        assert ids == [*range(69)]  # all of so small a vocabulary
        texts = [chat().text([token]) for token in ids]
        if swapped:
            texts[20], texts[21] = texts[21], texts[20]
        return Answers((200, json.dumps({"text": texts})))

    def check(answers: Answers) -> None:
        async def run() -> None:
            async with serving(answers) as url:
                await check_tokenizer("rollout.teacher=wise", url, "key", chat())

        asyncio.run(run())

    right = answer(swapped=False)
    check(right)
    assert right.paths == ["/v1/detokenize"]
    assert right.bodies[0]["tokens"][:2] == [[0], [1]]
    with pytest.raises(
        ValueError, match=r"^rollout\.teacher=wise: its tokenizer is not .* token 20"
    ):
        check(answer(swapped=True))
    assert not caplog.records
    check(Answers((500, "no tokenizer")))
    assert "wise: its tokenizer was not compared with the policy's: status 500" in caplog.text
    check(Answers((200, json.dumps({"text": ["a" * 2**20]}))))
    assert "compared with the policy's: its reply exceeds 1048576 bytes" in caplog.text


def test_only_the_texts_of_tokens_count_and_not_the_space_around_them():
    assert first_difference([4, 5], [" the", "\n"], ["the", ""]) is None
    said = first_difference([4, 5], ["the", None], ["the", "a"])
    assert said == "token 5 is None there and 'a' here"


def test_a_teacher_that_no_side_model_is_stops_the_run(tmp_path):
    async def run(teacher: str) -> Teacher | None:
        models = SideModels({}, RunDir(tmp_path))
        async with open_teacher(RolloutConfig(teacher=teacher), models, chat()) as found:
            return found

    assert asyncio.run(run("")) is None
    with pytest.raises(ValueError, match=r"^rollout\.teacher=wise: no such model"):
        asyncio.run(run("wise"))
