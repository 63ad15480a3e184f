"""Every part of every engine rank is sent once, from a rank that holds it, and loads are even."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_views import FAST, MANY, cases, load_all, random_weights

from megatron_bridge.direct_plan import DirectPlan
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.mapping import engine_views, float32_names
from megatron_bridge.models import describe
from megatron_bridge.views import copy_in
from rollout.server.direct import Expected

BUCKET_BYTES = 2000


@st.composite
def direct_cases(draw):
    """A trainer layout of `cases`, and engines that can serve its model."""
    config, layout, spec, multiple = draw(cases())
    model = describe(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fits = [
        tp
        for tp in (1, 2, 4)
        if model.architecture.engine_rows
        and heads % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
        and not model.architecture.engine_limit(model.shape)
    ]
    device = draw(st.sampled_from(["cpu", "cuda"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    if device == "cpu":
        fits = [tp for tp in fits if kv_heads % tp == 0]
    return (config, layout, spec, multiple), fits, device, draw(st.integers(1, 3)), dtype


def make_plan(trainer, tp, device, engines, dtype) -> DirectPlan:
    config, layout, spec, multiple = trainer
    export = ExportPlan(
        hf_config=config,
        layout=layout,
        spec=spec,
        dtype=dtype,
        vocab_pad_multiple=multiple,
        bucket_bytes=BUCKET_BYTES,
    )
    return DirectPlan(export=export, engine_tp=tp, num_engines=engines, engine_device=device)


def check_case(case, data) -> None:
    (config, layout, spec, multiple), fits, device, engines, dtype = case
    assume(fits)
    tp = data.draw(st.sampled_from(fits))
    plan = make_plan(case[0], tp, device, engines, dtype)
    kept = float32_names(describe(config))
    weights = random_weights(config)
    ranks = load_all(config, layout, spec, multiple, weights)
    views = [engine_views(config, tp, rank, device) for rank in range(tp)]
    held = [
        {name: torch.zeros(view.shape, dtype=torch.int32) for name, view in views[r % tp].items()}
        for r in range(engines * tp)
    ]
    written = [{name: torch.zeros_like(tensor) for name, tensor in each.items()} for each in held]
    sent = 0
    for each in plan.rounds:
        transfers = all_of(each, layout)
        assert sum(t.numel for t in transfers) == each.numel
        for end in ("sender", "receiver"):
            together = Counter()
            for t in transfers:
                together[getattr(t, end)] += t.numel
            # A transfer that is larger than a bucket travels by itself.
            most = max(together.values()) * each.dtype.itemsize
            assert len(transfers) == 1 or most <= BUCKET_BYTES
        for t in transfers:
            boxes = views[t.receiver % tp][t.target.parameter].boxes
            in_float32 = dtype is torch.float32 or kept.issuperset(box.name for box in boxes)
            assert each.dtype is (torch.float32 if in_float32 else dtype)
            source = ranks[t.sender][1][t.chunk, t.source.parameter][t.source.index]
            target = held[t.receiver][t.target.parameter][t.target.index]
            assert source.shape == target.shape
            target.copy_(source)
            written[t.receiver][t.target.parameter][t.target.index] += 1
            sent += t.numel
    for receiver, tensors in enumerate(held):
        for name, view in views[receiver % tp].items():
            wanted = torch.zeros(view.shape, dtype=torch.int32)
            copy_in(view, lambda box: weights[box.name][box.source], wanted)
            assert torch.equal(tensors[name], wanted)
            once = torch.zeros(view.shape, dtype=torch.int32)
            for box in view.boxes:
                once[box.local] = 1
            assert torch.equal(written[receiver][name], once)  # every byte once, padding never
    assert sent == engines * sum(view.covered for each in views for view in each.values())


def all_of(each, layout):
    """The transfers of all ranks in a round."""
    ranks = range(layout.world_size)
    return [t for rank in ranks for message in each.sent_by(rank).values() for t in message]


@FAST
@given(direct_cases(), st.data())
def test_an_engine_rank_expects_what_the_trainers_send_it(case, data):
    """Message by message, part by part: what `rollout.server.direct` makes of its orders."""
    (_, layout, _, _), fits, device, engines, dtype = case
    assume(fits)
    tp = data.draw(st.sampled_from(fits))
    plan = make_plan(case[0], tp, device, engines, dtype)
    for receiver in range(engines * tp):
        wanted = []
        for each in plan.rounds:
            messages = {rank: each.sent_by(rank).get(receiver) for rank in range(layout.world_size)}
            found = {rank: [t.target for t in ts] for rank, ts in messages.items() if ts}
            wanted += [(each.dtype, json.loads(json.dumps(found)))] if found else []
        told = Expected(json.loads(json.dumps(plan.expected(receiver)))).rounds()
        assert [(kind, {str(s): parts for s, parts in each.items()}) for kind, each in told] == (
            wanted
        )


@FAST
@given(direct_cases(), st.data())
def test_every_byte_of_every_engine_rank_is_sent_exactly_once(case, data):
    check_case(case, data)


@pytest.mark.nightly  # 400 random layouts take a minute
@MANY
@given(direct_cases(), st.data())
def test_every_byte_of_every_engine_rank_is_sent_exactly_once_at_night(case, data):
    check_case(case, data)


# Of all layouts few have replicas: that many are passed over is no fault.
@settings(FAST, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(direct_cases(), st.data())
def test_replicas_share_the_sending(case, data):
    """Two data-parallel replicas never differ by more than the largest part that is sent."""
    (_, layout, _, _), fits, device, engines, dtype = case
    assume(fits and layout.ep * layout.etp == 1 and layout.dp * layout.cp > 1)
    tp = data.draw(st.sampled_from(fits))
    plan = make_plan(case[0], tp, device, engines, dtype)
    load: Counter[int] = Counter()
    largest = 0
    for each in plan.rounds:
        for t in all_of(each, layout):
            load[t.sender] += t.numel
            largest = max(largest, t.numel)
    for pp in range(layout.pp):
        for place in range(layout.tp):
            replicas = range(
                layout.rank(pp=pp) + place, layout.rank(pp=pp) + layout.stage_size, layout.tp
            )
            loads = [load[rank] for rank in replicas]
            assert max(loads) - min(loads) <= largest
