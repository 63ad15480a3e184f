"""Plans are made with the cyclic garbage collector at rest.

They are some hundred thousand small tuples that all live on: going through them again and again,
as their number grows, takes longer than making them.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """The collector rests inside, and goes on afterwards if it was at work before."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
