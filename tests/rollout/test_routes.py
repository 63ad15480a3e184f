"""The engine's expert choices on their way from its reply into samples, and back off the wire."""

import base64
from dataclasses import replace

import numpy as np
import pytest

from framework.overlong import shorten_sample
from rollout.boundary import failed_sample
from rollout.routes import read_routes
from rollout.tokens import Transcript
from rollout.types import Sample
from rollout.wire import decode, encode
from tests.rollout.test_wire import make_sample


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.astype("<i4").tobytes()).decode()


def rows(*first: int) -> np.ndarray:
    """[n, 2] uint8, told apart by their first id."""
    return np.array([[each, each + 1] for each in first], dtype=np.uint8)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_ids_travel_in_the_smallest_type(largest, dtype):
    told = np.array([[0, 3, 1, 2], [7, 5, 4, largest]])
    found = read_routes(encoded(told), 2)
    assert found.dtype == dtype
    assert found.tolist() == told.tolist()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "--enable-return-routed-experts"),
        ("!", "not base64"),
        (encoded(np.zeros(5)), "20 bytes are not those of 2 tokens"),
        ("", "0 bytes are not those of 2 tokens"),
        (encoded(np.array([[-1], [0]])), "ids from -1 to 0"),
    ],
)
def test_a_reply_without_the_routes_that_were_asked_for_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read_routes(text, 2)


def converse() -> Transcript:
    """Prompt of 2, answer of 2, observation of 1, answer of 2."""
    transcript = Transcript([1, 2])
    transcript.add_reply([3, 4], [-1.0, -1.0], [0, 0], routes=rows(10, 11, 12))
    transcript.add_observation([5])
    return transcript


@pytest.mark.parametrize("first", [0, 3])
def test_tokens_keep_the_routes_of_their_own_turn(first):
    """Whether a later turn tells those of all tokens or only the others."""
    transcript = converse()
    assert transcript.num_routes == 3
    later = rows(20, 21, 22, 23, 24, 25)[first:]  # its engine may have newer weights
    transcript.add_reply([6, 7], [-1.0, -1.0], [1, 1], routes=later)
    sample = transcript.sample(group_id=0, index=0)
    sample.check()
    assert sample.routes is not None
    assert sample.routes[:, 0].tolist() == [10, 11, 12, 23, 24, 25]


def test_what_follows_the_last_answer_has_no_routes():
    sample = converse().sample(group_id=0, index=0)
    sample.check()
    assert sample.routes is not None
    assert len(sample.routes) == 3


def test_a_gap_in_the_routes_is_refused():
    transcript = converse()
    with pytest.raises(ValueError, match="routes begin at token 4; 3 tokens have some"):
        transcript.add_reply([6, 7], [-1.0, -1.0], [1, 1], routes=rows(24, 25))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_samples_arrive_with_their_routes(dtype):
    sent = make_sample(routes=rows(*range(6)).astype(dtype))
    received = decode(encode(sent), Sample)
    received.check()
    assert received.routes is not None
    assert received.routes.dtype == dtype
    assert received.routes.tolist() == sent.routes.tolist()  # pyright: ignore
    assert decode(encode(make_sample()), Sample).routes is None


@pytest.mark.parametrize(
    "routes",
    [rows(*range(5)), rows(*range(7)), rows(*range(6))[0], rows(*range(6)).astype(np.int32)],
)
def test_routes_that_do_not_fit_the_tokens_are_refused(routes):
    with pytest.raises(ValueError, match="sample 7/2: routes"):
        make_sample(routes=routes).check()


def test_shortened_and_failed_samples():
    whole = make_sample(routes=rows(*range(6)))
    short = shorten_sample(whole, 1)
    short.check()
    assert short.routes is not None
    assert len(short.routes) == 4
    failed = failed_sample(replace(whole), "no answer")
    failed.check()
    assert failed.routes is None
