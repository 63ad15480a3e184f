import msgspec
import numpy as np
import pytest

from rollout.types import Sample, Status, StepBatch
from rollout.wire import decode, encode


def make_sample(num_response: int = 3, **changes) -> Sample:
    values = {
        "group_id": 7,
        "index": 2,
        "tokens": np.arange(4 + num_response, dtype=np.int32),
        "prompt_length": 4,
        "loss_mask": np.ones(num_response, dtype=np.uint8),
        "rollout_logprobs": -np.linspace(0.1, 1.7, num_response, dtype=np.float32),
        "versions": np.full(num_response, 5, dtype=np.int32),
        "turn_starts": np.zeros(1, dtype=np.int32),
        "reward": 0.5,
        "rewards": {"environment": 0.5},
        "status": Status.TRUNCATED,
        "metadata": {"answer": "0123"},
    }
    return Sample(**(values | changes))


def test_samples_arrive_bit_equal_and_writable():
    sent = [make_sample(), make_sample(1, tokens=np.array([1, 2, 3, 4, 5], dtype=np.int32))]
    received = decode(encode(sent), list[Sample])
    for one, other in zip(sent, received, strict=True):
        for name in ("tokens", "loss_mask", "rollout_logprobs", "versions", "turn_starts"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
            theirs[:] = 0  # memory of its own
        assert other.status is Status.TRUNCATED
        assert (other.reward, other.rewards, other.metadata) == (
            0.5,
            sent[0].rewards,
            sent[0].metadata,
        )


def test_non_contiguous_and_empty_arrays():
    sample = make_sample(0, tokens=np.arange(8, dtype=np.int32)[::2])
    received = decode(encode(sample), Sample)
    assert received.tokens.tolist() == [0, 2, 4, 6]
    assert received.response_length == 0


def test_arrays_of_objects_cannot_be_sent():
    with pytest.raises(ValueError, match=r"arrays of object"):
        encode(make_sample(tokens=np.array([object()])))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (["object", [1], b"12345678"], "an array is"),
        (["int32", [3], b"1234"], "needs 12 bytes, got 4"),
        (["int32", [-1], b""], "not a list of sizes"),
        (["int32", ["a"], b""], "not a list of sizes"),
        (["int32", [1]], "an array is"),
        ("int32", "an array is"),
        (5, "an array is"),
    ],
)
def test_malformed_arrays_are_refused_with_the_field(array, reason):
    fields = msgspec.msgpack.decode(encode(make_sample()))
    fields["tokens"] = array
    with pytest.raises(ValueError, match=reason) as error:
        decode(msgspec.msgpack.encode(fields), Sample)
    assert "tokens" in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"not msgpack", encode({"step": "one"})])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError, match=r"not a StepBatch message"):
        decode(data, StepBatch)
