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
from typing import Any

import torch
import torch.distributed as dist

LOADER = "rollout.server.direct.load"

logger = logging.getLogger(__name__)


class _Member:
    """This engine rank in the group of one set of trainers."""

    def __init__(self, order: dict[str, Any]) -> None:
        from sglang.srt.utils import init_custom_process_group

        self.rounds = order["rounds"]
        """[{dtype, messages: [[sender, numel, [[parameter, lead, start, size]...]]...]}...]"""
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
        for each in self.rounds:
            dtype = getattr(torch, each["dtype"])
            arriving = []
            for sender, numel, parts in each["messages"]:
                message = torch.empty(numel, dtype=dtype, device=device)
                work = dist.irecv(message, group=self.group, group_src=sender)
                arriving.append((work, message, parts))
            for work, message, parts in arriving:
                assert work is not None
                work.wait()
                try:
                    _place(message, parts, parameters)
                except (RuntimeError, KeyError, ValueError, IndexError) as error:
                    wrong = wrong or error
        if wrong is not None:
            raise wrong

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


def _place(message: torch.Tensor, parts: list[Any], parameters: dict[str, Any]) -> None:
    """A flat message into the parameters that it is made for."""
    offset = 0
    for name, lead, start, size in parts:
        index = (*lead, *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
        target = parameters[name].data[index]
        numel = target.numel()
        target.copy_(message[offset : offset + numel].view(size))
        offset += numel
    if offset != message.numel():
        raise ValueError(f"{offset} of {message.numel()} elements of a message have a place")
