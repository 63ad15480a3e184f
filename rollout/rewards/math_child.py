"""The worker of the reward `math`: equality of mathematical answers (math-verify).

Started by rewards/workers.py as a program: {"gold", "reply"} a line in, {"result": bool} out.
"""

import json
import logging
import os
import resource
import sys
from typing import IO

_ALARM_S = 3
"""Of each of math-verify's steps, by its own means; what does not heed them is killed later."""
_MEMORY_BYTES = 2 << 30


def equal(gold: str, reply: str) -> bool:
    """Whether the last mathematical answer in `reply` is the one of `gold`; no where there is no
    answer, or none within the bound."""
    from math_verify import parse, verify

    wanted = parse(gold, parsing_timeout=_ALARM_S)
    found = parse(reply, parsing_timeout=_ALARM_S)
    return verify(wanted, found, timeout_seconds=_ALARM_S)


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until there are no more requests."""
    _say(replies, {"ready": True})
    for line in requests:
        given = json.loads(line)
        try:
            reply = {"result": equal(given["gold"], given["reply"])}
        except Exception as error:  # sympy may raise anything on what a policy writes
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        _say(replies, reply)


def _say(replies: IO[bytes], reply: dict) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def main() -> None:
    """Nothing but replies goes to stdout; memory is bounded."""
    logging.disable()  # math-verify repeats what it could not parse
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    equal("1", "1")  # what it imports and compiles is not the first request's time
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
