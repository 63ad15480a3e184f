"""Weights straight from every trainer rank to every engine rank: each part travels once.

    rank 0          tells all ranks the group, then orders the engines by HTTP to join, to receive
    every rank      packs its parts of a round, flat, one message an engine rank; the next round is
                    packed while this one travels
    engine ranks    `rollout.server.direct`: receive, place, confirm to rank 0

No rank assembles a tensor, except to compare checksums: weight_sync.verify=true gathers the whole
model on rank 0 beside the push, and costs what weight_sync=distributed costs.
"""

import datetime
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from framework.weight_sync.base import PushContext, Transport
from framework.weight_sync.engines import Engines, WeightSyncError
from framework.weight_sync.groups import join_update_group, open_store
from framework.weight_sync.orders import ENDPOINT, order_body
from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.direct_plan import DirectPlan
from megatron_bridge.direct_template import Transfer
from megatron_bridge.export import Bucket
from megatron_bridge.load import parameters
from megatron_bridge.merge import whole_parameters
from rollout.server.direct import LOADER
from rollout.server.server_process import public_host

Key = tuple[int, str]
"""(model chunk, parameter)."""


class DirectPush(Transport):
    """Every trainer rank is a member of one group with every engine rank."""

    sends_whole_tensors = False

    def __init__(self, context: PushContext) -> None:
        self.context = context
        self._world = context.plan.layout.world_size
        self._urls: list[str] = []
        self._group: Any = None
        self._rounds: list[tuple[torch.dtype, dict[int, list[Transfer]]]] = []
        """Type, and engine rank -> what this rank sends it; round by round."""
        self._size_bytes = 0
        """What all ranks send."""
        self._backend = "nccl" if torch.cuda.is_available() else "gloo"

    def send(
        self,
        version: int,
        buckets: Iterable[Bucket],
        engines: Engines,
        verifier: ExpectedChecksums | None,
    ) -> int:
        """See `base.Transport`."""
        order = self._order(engines)
        store = self._open(order, engines.timeout_s)
        self._share(order)
        if order["failed"]:
            raise WeightSyncError(f"no place for engines and trainers to meet: {order['failed']}")
        failure: RuntimeError | OSError | None = None
        try:
            engines.begin_session()
            if store is not None:
                self._join(order, store, engines)
            body = order_body(
                LOADER,
                [{"do": "receive"}] * self.context.engine_tp,
                weight_version=str(version),
                flush_cache=self.context.flush_cache,
            )
            replies = engines.start(ENDPOINT, [body] * len(engines.urls))
            self._send_rounds()
            self._confirmed(engines)
            engines.finish(replies)
        except (RuntimeError, OSError) as error:
            # A WeightSyncError, torch's of a member that is gone, a reply's TimeoutError.
            failure = error
        if not self._all_well(failure is None):
            raise WeightSyncError(f"not every part reached every engine: {failure}") from failure
        engines.post("/end_weight_update", {})
        for bucket in buckets if verifier is not None else ():
            assert verifier is not None
            verifier.add(bucket)
        return self._size_bytes // len(engines.urls)

    def assist(self) -> None:
        """The other ranks' part of `send`."""
        order, failed = self._share(None), False
        if order["failed"]:
            return
        try:
            if order["fresh"]:
                self._join(order, None, None)
            self._send_rounds()
        except (RuntimeError, OSError):
            failed = True
        self._all_well(not failed)

    def close(self, engines: Engines) -> None:
        """Leave the group; the engines leave theirs when other trainers come."""
        self._leave()

    def _order(self, engines: Engines) -> dict[str, Any]:
        """What every trainer rank must know of this push."""
        return {
            "fresh": self._group is None or self._urls != engines.urls,
            "address": public_host(self.context.host),
            "name": f"drivetrain_{secrets.token_hex(4)}",
            "urls": list(engines.urls),
            "timeout_s": engines.timeout_s,
            "failed": "",
        }

    def _open(self, order: dict[str, Any], timeout_s: float) -> Any:
        """The store where a new group meets, its port in the order; else why there is none."""
        if not order["fresh"]:
            return None
        try:
            store = open_store(order["address"], timeout_s)
        except (RuntimeError, OSError) as error:
            order["failed"] = str(error) or repr(error)
            return None
        order["port"] = store.port
        return store

    def _share(self, order: dict[str, Any] | None) -> dict[str, Any]:
        box: list[Any] = [order]
        if self._world > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def _all_well(self, well: bool) -> bool:
        """Whether every trainer rank is; else the group is given up."""
        if self._world > 1:
            flag = torch.tensor([well], dtype=torch.uint8)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            well = bool(flag.item())
        if not well:
            self._leave()
        return well

    def _leave(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _join(self, order: dict[str, Any], store: Any, engines: Engines | None) -> None:
        """A new group with these engines; on rank 0 `store` and `engines` are given."""
        context, tp = self.context, self.context.engine_tp
        self._leave()
        self._urls = order["urls"]
        plan = DirectPlan(
            export=context.plan,
            engine_tp=tp,
            num_engines=len(self._urls),
            engine_device=context.engine_device,
        )
        self._rounds = [(each.dtype, each.sent_by(context.rank)) for each in plan.rounds]
        self._size_bytes = sum(each.size_bytes for each in plan.rounds)
        world_size = self._world + tp * len(self._urls)
        replies = []
        if engines is not None:
            common = {key: order[key] for key in ("address", "port", "name", "timeout_s")}
            common |= {"do": "join", "backend": self._backend, "world_size": world_size}
            orders = [
                {**common, "rank": self._world + r, "expected": plan.expected(r)}
                for r in range(tp * len(self._urls))
            ]
            parts = [orders[k * tp : (k + 1) * tp] for k in range(len(self._urls))]
            replies = engines.start(ENDPOINT, [order_body(LOADER, part) for part in parts])
        if store is None:
            timeout = datetime.timedelta(seconds=order["timeout_s"])
            store = dist.TCPStore(order["address"], order["port"], timeout=timeout)
        self._group = join_update_group(
            store,
            rank=context.rank,
            world_size=world_size,
            name=order["name"],
            backend=self._backend,
            timeout_s=order["timeout_s"],
        )
        if engines is not None:
            engines.finish(replies)

    def _send_rounds(self) -> None:
        """This rank's messages of all rounds, two rounds in memory."""
        local = whole_parameters(self.context.chunks)
        device = next(iter(local.values())).device
        sent: list[list[Any]] = [[], []]
        for number, held in enumerate(read_once(local, [each for _, each in self._rounds])):
            dtype, messages = self._rounds[number]
            slot = number % 2
            for work in sent[slot]:
                work.wait()
            sent[slot] = []
            for receiver, transfers in messages.items():
                memory = self.context.buffers.take(
                    f"direct_{slot}_{receiver}",
                    sum(transfer.numel for transfer in transfers) * dtype.itemsize,
                    device,
                )
                message = memory.view(dtype)
                pack(held, transfers, message)
                to = self._world + receiver
                sent[slot].append(dist.isend(message, group=self._group, group_dst=to))
        for work in (*sent[0], *sent[1]):
            work.wait()

    def _confirmed(self, engines: Engines) -> None:
        device = next(iter(parameters(self.context.chunks).values())).device
        for receiver in range(self.context.engine_tp * len(engines.urls)):
            told = torch.zeros(1, dtype=torch.uint8, device=device)
            dist.recv(told, group=self._group, group_src=self._world + receiver)
            if not told.item():
                engine, rank = divmod(receiver, self.context.engine_tp)
                raise WeightSyncError(f"{engines.urls[engine]}: rank {rank} says why in its log")


def read_once(
    local: Mapping[Key, torch.Tensor], rounds: Sequence[Mapping[int, Sequence[Transfer]]]
) -> Iterator[dict[Key, torch.Tensor]]:
    """The parameters that each round sends parts of; each is asked for in its first round and kept
    until its last, for an adapter is merged anew whenever its weight is asked for."""
    needed = [
        dict.fromkeys((t.chunk, t.source.parameter) for ts in messages.values() for t in ts)
        for messages in rounds
    ]
    last = {key: number for number, keys in enumerate(needed) for key in keys}
    held: dict[Key, torch.Tensor] = {}
    for number, keys in enumerate(needed):
        for key in keys:
            if key not in held:
                held[key] = local[key]
        yield held
        held = {key: content for key, content in held.items() if last[key] > number}


def pack(
    local: Mapping[Key, torch.Tensor],
    transfers: Sequence[Transfer],
    message: torch.Tensor,
) -> None:
    """Put the contents of `transfers`, one after another, into a flat message.

    local: (chunk, name) -> parameter.
    """
    offset = 0
    for each in transfers:
        content = local[each.chunk, each.source.parameter][each.source.index]
        message[offset : offset + each.numel].view(content.shape).copy_(content)
        offset += each.numel
