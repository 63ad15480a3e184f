"""weight_sync=direct by itself, for scripts/benchmarks/weights.py: its plan, packing and placing.

What two machines do at the same time is done one after the other here, in one process and over
memory: a trainer rank packs the messages of a round, the engine ranks put each part in its place.
So "both" copies every byte twice, which can be no faster than half a memcpy; no network and no
process is between the two copies. Each machine's own part is bounded by one.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

ENGINE_TP = 2


class Planned(NamedTuple):
    """A plan, and what it took to make it."""

    wall_s: float
    """Seconds of rank 0 for both of these."""
    plan_s: float
    """CPU seconds of one trainer rank: the plan and all that this rank sends."""
    orders_s: float
    """CPU seconds of rank 0 beside that: what each engine rank must know."""
    sent_over_least: float
    num_transfers: int
    """Of all ranks."""


def plan_direct(export: Any, engine_tp: int, num_engines: int) -> Planned:
    """For rank 0, engines on GPUs."""
    from megatron_bridge.direct_plan import DirectPlan

    started, wall = time.process_time(), time.perf_counter()
    plan = DirectPlan(
        export=export, engine_tp=engine_tp, num_engines=num_engines, engine_device="cuda"
    )
    for each in plan.rounds:
        each.sent_by(0)
    planned = time.process_time()
    for receiver in range(engine_tp * num_engines):
        plan.expected(receiver)
    ordered, wall = time.process_time(), time.perf_counter() - wall
    sent = sum(each.numel for each in plan.rounds)
    count = sum(len(piece.segment.transfers) for each in plan.rounds for piece in each.pieces)
    return Planned(
        wall,
        planned - started,
        ordered - planned,
        sent / (num_engines * held_by_an_engine(export.model, engine_tp)),
        count,
    )


def held_by_an_engine(model: Any, engine_tp: int) -> int:
    """Elements that all ranks of an engine hold, padding aside: the least that must travel."""
    from megatron_bridge.mapping import engine_section_views
    from megatron_bridge.models.architecture import Section

    shape = model.shape
    times = dict.fromkeys((Section.EMBEDDING, Section.FINAL), 1)
    times |= {} if shape.tied else {Section.OUTPUT: 1}
    for layer in range(shape.num_layers):
        for section in shape.layer_sections(layer):
            times[section] = times.get(section, 0) + 1
    return sum(
        count * view.covered
        for section, count in times.items()
        for rank in range(engine_tp)
        for view in engine_section_views(model, section, engine_tp, rank, "cuda").values()
    )


Actions = dict[str, tuple[Callable[[], None], int]]
"""Name -> what to run, and how many copies of all bytes that is."""


def direct_actions(export: Any, chunks: Any) -> tuple[Actions, float]:
    """(pack, place, both: round by round in warm buffers; bytes sent over the least).

    One trainer rank, an engine of two ranks on this CPU.
    """
    import torch

    from framework.weight_sync.direct import pack
    from megatron_bridge.direct_plan import DirectPlan
    from megatron_bridge.load import parameters
    from megatron_bridge.mapping import engine_views
    from rollout.server.direct import Expected, place

    plan = DirectPlan(export=export, engine_tp=ENGINE_TP, num_engines=1, engine_device="cpu")
    local, rounds = parameters(chunks), [each.sent_by(0) for each in plan.rounds]
    expected = [Expected(plan.expected(rank)) for rank in range(ENGINE_TP)]
    views = [engine_views(export.hf_config, ENGINE_TP, rank, "cpu") for rank in range(ENGINE_TP)]
    engines = [
        {name: torch.zeros(view.shape, dtype=export.dtype) for name, view in each.items()}
        for each in views
    ]
    longest = max(sum(t.numel for t in ts) for each in rounds for ts in each.values())
    memory = [torch.zeros(longest, dtype=export.dtype) for _ in range(ENGINE_TP)]

    def run(packs: bool, places: bool) -> None:
        arriving = [each.rounds() for each in expected]
        with torch.no_grad():
            for messages in rounds:
                for receiver, transfers in messages.items():
                    message = memory[receiver][: sum(t.numel for t in transfers)]
                    if packs:
                        pack(local, transfers, message)
                    if places:
                        place(message, next(arriving[receiver])[1][0], engines[receiver])

    actions: Actions = {
        "direct, pack": (lambda: run(True, False), 1),
        "direct, place": (lambda: run(False, True), 1),
        "direct, both": (lambda: run(True, True), 2),
    }
    sent = sum(each.numel for each in plan.rounds)
    least = sum(view.covered for each in views for view in each.values())
    return actions, sent / least
