"""Runs the table of logits: tiny models, processes, and what each row is off by.

transformers and megatron-core are imported once, in the process that calls `measure`; the ranks are
forked from it. Rows of one world size share a group of processes, a few at a time: gloo keeps the
threads of every process group until its process ends.
"""

import importlib
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bridge_models import create_model
from logits_cases import Case
from megatron_worker import plant_wrong_rule, run_case

from megatron_bridge import conversion, models

CASE_TIMEOUT_S = 60.0
CASES_A_GROUP = 8


def measure(root: Path, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Make the models under `root`, run every case; a row for each, by world size.

    A row: name, difference (of the logits, relative), errors, exported (tensors), time_s, and,
    where the case saves or has adapters, `ranks`: what each rank saw.
    """
    torch.set_num_threads(1)  # threads do not survive the fork
    importlib.import_module("framework.megatron.checkpoint")
    for model in dict.fromkeys(case.model for case in cases):
        torch.save(create_model(model, root / model), root / f"{model}.logits")
        conversion.to_megatron(root / model, root / f"{model}.megatron", 1 << 30)
    for world in sorted({case.world_size for case in cases}):
        alike = [case for case in cases if case.world_size == world]
        for start in range(0, len(alike), CASES_A_GROUP):
            group = alike[start : start + CASES_A_GROUP]
            run_group(root, world, group)
            yield from (_row(root, case) for case in group)


def _row(root: Path, case: Case) -> dict[str, Any]:
    """What the ranks left, put together."""
    ranks = [json.loads(_path(root, case, rank).read_text()) for rank in range(case.world_size)]
    differences = [rank["difference"] for rank in ranks if "difference" in rank]
    return {
        "name": case.name,
        "processes": case.world_size,
        "difference": (min if case.wrong else max)(differences),
        "errors": [error for rank in ranks for error in rank["errors"]],
        "exported": sum(rank["exported"] for rank in ranks),
        "time_s": max(rank["time_s"] for rank in ranks),
        "ranks": ranks if case.save or case.adapter else [],
    }


def _path(root: Path, case: Case, rank: int) -> Path:
    return root / f"{case.name.replace(' ', '_')}.{rank}.json"


def run_group(root: Path, world: int, cases: Sequence[Case]) -> None:
    """Run cases of one world size in one group of forked ranks; RuntimeError when a rank fails."""
    context = multiprocessing.get_context("fork")
    (root / f"world{world}.store").unlink(missing_ok=True)  # of the group before
    ranks = [
        context.Process(target=_rank, args=(root, rank, world, cases)) for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + CASE_TIMEOUT_S * len(cases)
    try:
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} ranks took over {CASE_TIMEOUT_S:g} s a case")
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    failures = [path.read_text() for path in sorted(root.glob("failed.*"))]
    if failures or any(rank.exitcode for rank in ranks):
        raise RuntimeError(failures[0] if failures else f"a rank ended: {ranks}")


def _rank(root: Path, rank: int, world: int, cases: Sequence[Case]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    tables = dict(models.ARCHITECTURES)
    case = None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{root / f'world{world}.store'}",  # a file: no port to reserve
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=CASE_TIMEOUT_S),
        )
        for case in cases:
            models.ARCHITECTURES.update(tables)
            if case.wrong:
                plant_wrong_rule(case.wrong)
            started = time.perf_counter()
            result = run_case(rank, root, case)
            result["time_s"] = time.perf_counter() - started
            _path(root, case, rank).write_text(json.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        name = case.name if case else "start"
        (root / f"failed.{rank}").write_text(f"{name}, rank {rank}:\n{traceback.format_exc()}")
        raise
