"""What an engine rank does under weight_sync=direct: take its own parts from the trainer ranks.

SGLang's own extension point, `--custom-weight-loader`: /update_weights_from_tensor with this
function's name as load_format calls `load` on every engine rank. The named tensors of such a
request are an order: JSON in the name, nothing in the tensor.

    join      form the group of all trainer and engine ranks; learn what will come, round by round
    receive   take one push, then tell trainer rank 0 whether all of it came
"""

import contextlib
import datetime
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from rollout.server.derived import refresh_derived

LOADER = "rollout.server.direct.load"

logger = logging.getLogger(__name__)


class Expected:
    """What comes to this rank, as the trainers planned it: segments of a layer, and where they are
    needed (`megatron_bridge/direct_plan.py`, `DirectPlan.expected`)."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._segments = dict(told["segments"])
        self._rounds = told["rounds"]

    def rounds(self) -> Iterator[tuple[torch.dtype, dict[int, list[Any]]]]:
        """Type of the messages; sender -> the parts of its message, [parameter, lead, start, size]
        each."""
        for dtype, pieces in self._rounds:
            messages: dict[int, list[Any]] = {}
            for segment, layer, ranks in pieces:
                for sender, parts in self._segments.get(segment, ()):
                    messages.setdefault(ranks[sender], []).extend(
                        [name.replace("{layer}", str(layer)), *where] for name, *where in parts
                    )
            if messages:
                yield getattr(torch, dtype), messages


class _Member:
    """This engine rank in the group of one set of trainers."""

    def __init__(self, order: dict[str, Any]) -> None:
        from sglang.srt.utils import init_custom_process_group

        self.expected = Expected(order["expected"])
        self.group: Any = init_custom_process_group(
            backend=order["backend"],
            init_method=f"tcp://{order['address']}:{order['port']}",
            timeout=datetime.timedelta(seconds=order["timeout_s"]),
            world_size=order["world_size"],
            rank=order["rank"],
            group_name=order["name"],
        )

    def receive(self, model: Any) -> None:
        """Every round: all its messages at once, then each part to its place.

        All of them are taken, whatever is wrong with one: else senders would wait for nobody.
        """
        wrong: Exception | None = None
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        for dtype, messages in self.expected.rounds():
            arriving = []
            for sender, parts in messages.items():
                numel = sum(math.prod(size) for *_, size in parts)
                message = torch.empty(numel, dtype=dtype, device=device)
                work = dist.irecv(message, group=self.group, group_src=sender)
                arriving.append((work, message, parts))
            for work, message, parts in arriving:
                assert work is not None
                work.wait()
                try:
                    place(message, parts, parameters)
                except (RuntimeError, KeyError, ValueError, IndexError) as error:
                    wrong = wrong or error
        if wrong is not None:
            raise wrong
        refresh_derived(model)

    def tell(self, well: bool, device: torch.device) -> None:
        """One byte to trainer rank 0: 1, all came; 0, it did not."""
        dist.send(
            torch.tensor([well], dtype=torch.uint8, device=device), group=self.group, group_dst=0
        )


_members: list[_Member] = []
"""At most one: new trainers take the place of those before."""


def load(model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Carry out an order. A failure is logged and told to the trainers: SGLang would die of it."""
    device = next(model.parameters()).device
    for text, _ in named_tensors:
        order = json.loads(text)
        try:
            with torch.no_grad():
                _carry_out(order, model, device)
        except (RuntimeError, KeyError, ValueError, IndexError):
            logger.exception("weight_sync=direct: %s failed", order["do"])
            with contextlib.suppress(RuntimeError):
                if _members and order["do"] == "receive":
                    _members[0].tell(False, device)


def _carry_out(order: dict[str, Any], model: Any, device: torch.device) -> None:
    if order["do"] == "join":
        while _members:
            dist.destroy_process_group(_members.pop().group)
        _members.append(_Member(order))
        return
    if not _members:
        raise RuntimeError("no group was joined")
    _members[0].receive(model)
    _members[0].tell(True, device)


def place(message: torch.Tensor, parts: list[Any], parameters: dict[str, Any]) -> None:
    """A flat message into the parameters that it is made for: [parameter, lead, start, size]..."""
    offset = 0
    for name, lead, start, size in parts:
        index = (*lead, *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
        target = parameters[name].data[index]
        numel = target.numel()
        target.copy_(message[offset : offset + numel].view(size))
        offset += numel
    if offset != message.numel():
        raise ValueError(f"{offset} of {message.numel()} elements of a message have a place")
