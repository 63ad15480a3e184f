"""What a trainer rank does of a direct push, without engines."""

from collections import Counter
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bare_models import BareRank, bare_plan

from framework.weight_sync import direct
from framework.weight_sync.base import PushContext
from framework.weight_sync.direct import DirectPush, Key, read_once
from framework.weight_sync.engines import WeightSyncError
from megatron_bridge.direct_plan import DirectPlan
from megatron_bridge.export import ExportBuffers
from megatron_bridge.layout import Layout
from tests.forked_ranks import run_ranks

TIMEOUT_S = 60.0


class Counted(Mapping[Key, torch.Tensor]):
    """Parameters that are counted when they are read, as adapters are merged when they are."""

    def __init__(self, plan: Any) -> None:
        self.rank, self.reads = BareRank(plan, 0), Counter()

    def __getitem__(self, key: Key) -> torch.Tensor:
        self.reads[key] += 1
        return self.rank.chunks[key[0]].get_parameter(key[1])

    def __iter__(self) -> Iterator[Key]:
        return iter(self.rank.views)

    def __len__(self) -> int:
        return len(self.rank.views)


def test_a_weight_is_merged_once_however_many_receive_it(tiny_model_dir):
    """Four engine ranks, and buckets so small that a weight is spread over several rounds."""
    plan = bare_plan(tiny_model_dir, Layout(), bucket_bytes=2_000)
    rounds = DirectPlan(export=plan, engine_tp=2, num_engines=2, engine_device="cpu").rounds
    messages = [each.sent_by(0) for each in rounds]
    local, most, kept = Counted(plan), 0, 0
    seen: dict[Key, set[int]] = {}
    for number, held in enumerate(read_once(local, messages)):
        for receiver, transfers in messages[number].items():
            for each in transfers:
                key = each.chunk, each.source.parameter
                seen.setdefault(key, set()).add(receiver)
                kept += held[key][each.source.index].numel()
        most = max(most, len(held))
    assert set(local.reads) == set(local)
    assert set(local.reads.values()) == {1}
    assert all(receivers == {0, 1, 2, 3} for receivers in seen.values())
    assert kept == sum(each.numel for each in rounds)
    assert most < len(local) / 2  # those that are done are let go


def test_no_rank_is_left_waiting_when_there_is_no_place_to_meet(tiny_model_dir, tmp_path):
    """Rank 0 fails, and says so to the others before they wait for it."""
    plan = bare_plan(tiny_model_dir, Layout(tp=2))

    def work(rank: int) -> None:
        def refuse(*_: object) -> None:
            raise dist.DistNetworkError("the address is in use")

        direct.open_store = refuse  # in this process, which is a rank, and no other
        context = PushContext(
            plan=plan,
            chunks=[],
            buffers=ExportBuffers(),
            rank=rank,
            engine_tp=1,
            engine_device="cpu",
            engine_dtype=torch.float32,
            host="127.0.0.1",
            scratch_dir=tmp_path,
            like=tiny_model_dir,
            flush_cache=True,
        )
        push = DirectPush(context)
        engines: Any = SimpleNamespace(urls=["http://a"], timeout_s=TIMEOUT_S)
        if rank == 0:
            with pytest.raises(WeightSyncError, match="meet: the address is in use"):
                push.send(1, (), engines, None)
        else:
            push.assist()
        dist.barrier()

    run_ranks("no place to meet", 2, work, tmp_path, TIMEOUT_S / 2)
