"""Typed binary messages: msgpack of the dataclasses in `rollout.types`, numpy arrays included.

No pickle and nothing evaluated: what arrives is decoded into a named type or refused.
An array travels as [dtype, shape, little-endian bytes] with its dtype on a short list.
"""

import math
import sys
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")

ARRAY_DTYPES = ("uint8", "uint16", "int32", "int64", "float32")
CONTENT_TYPE = "application/msgpack"

if sys.byteorder != "little":
    raise ImportError("drivetrain's messages are little-endian; this machine is not")


def _encode_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"a {type(value).__name__} cannot be sent")
    if value.dtype.name not in ARRAY_DTYPES:
        raise ValueError(f"arrays of {value.dtype} are not sent; use one of {list(ARRAY_DTYPES)}")
    return (value.dtype.name, value.shape, np.ascontiguousarray(value).data)


def _decode_array(wanted: type, value: Any) -> Any:
    if wanted is not np.ndarray:
        raise NotImplementedError(f"a {wanted.__name__} cannot be received")
    match value:
        case [str(dtype), [*shape], bytes(data)] if dtype in ARRAY_DTYPES:
            pass
        case _:
            raise ValueError(f"an array is [dtype of {list(ARRAY_DTYPES)}, shape, bytes]")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array shape {shape} is not a list of sizes")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise ValueError(f"array {dtype}{shape} needs {expected} bytes, got {len(data)}")
    # A copy in memory of its own: writable, and free of the message's lifetime.
    return np.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)


@cache
def _decoder(wanted: Any) -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(wanted, dec_hook=_decode_array)


def encode(value: Any) -> bytes:
    """The bytes of one message."""
    return _encoder.encode(value)


def decode(data: bytes, wanted: type[T]) -> T:
    """The message as `wanted`; ValueError tells which field does not fit."""
    try:
        return _decoder(wanted).decode(data)
    except msgspec.DecodeError as error:  # includes ValidationError
        name = getattr(wanted, "__name__", str(wanted))
        raise ValueError(f"not a {name} message: {error}") from error
