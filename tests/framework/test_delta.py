"""weight_sync=delta, engine ranks in this process: lost, repeated, damaged versions are mended."""

import base64
import json
import pickle
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_models import bare_plan, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framework.weight_sync import delta
from framework.weight_sync.base import PushContext
from framework.weight_sync.delta import DeltaPush
from framework.weight_sync.engines import WeightSyncError
from megatron_bridge.export import Bucket, ExportBuffers
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import engine_views
from megatron_bridge.views import copy_in
from rollout.server.delta import INDEX, PAYLOAD, Receiver, carry_out
from rollout.server.delta_codec import AT, WHOLE, XOR, apply, encode

TP = 2
A, B = "http://a", "http://b"


class EngineRank:
    """The parameters of one rank of an engine, and what it knows of them."""

    def __init__(self, hf_config: Any, rank: int) -> None:
        self.views = engine_views(hf_config, TP, rank, "cpu")
        self.receiver = Receiver()
        self.parameters = {
            name: nn.Parameter(torch.full(view.shape, torch.nan, dtype=torch.bfloat16))
            for name, view in self.views.items()
        }

    def named_parameters(self) -> Any:
        return self.parameters.items()

    def is_of(self, weights: dict[str, torch.Tensor]) -> bool:
        """Bit for bit."""
        for name, view in self.views.items():
            wanted = torch.empty(view.shape, dtype=torch.bfloat16)
            copy_in(view, lambda box: weights[box.name][box.source], wanted)
            if not bits(self.parameters[name].data).equal(bits(wanted)):
                return False
        return True


class Engines:
    """What `DeltaPush` needs of framework.weight_sync.engines.Engines."""

    def __init__(self, hf_config: Any, urls: list[str]) -> None:
        self.urls, self.in_doubt = urls, False
        self.ranks = {url: [EngineRank(hf_config, rank) for rank in range(TP)] for url in urls}
        self.deaf: set[str] = set()
        self.told: list[tuple[str, str]] = []
        """(engine, kind of directory) of every order."""

    def only(self, urls: list[str]) -> Any:
        return SimpleNamespace(
            start=lambda path, bodies: [
                self._order(url, body) for url, body in zip(urls, bodies, strict=True)
            ],
            finish=lambda replies: [reply.result() for reply in replies],
            close=lambda: None,
        )

    def begin_session(self) -> None:
        self.in_doubt = True

    def post(self, path: str, body: dict[str, Any]) -> None:
        assert path == "/end_weight_update"

    def _order(self, url: str, body: dict[str, Any]) -> Future[None]:
        assert body["load_format"] == "rollout.server.delta.load"
        for rank, text in zip(self.ranks[url], body["serialized_named_tensors"], strict=True):
            ((order, _),) = pickle.loads(base64.b64decode(text))
            directory = Path(json.loads(order)["directory"])
            if url not in self.deaf:
                carry_out(json.loads(order), rank.receiver, rank)
        self.told.append((url, directory.name))
        reply: Future[None] = Future()
        reply.set_result(None)
        return reply


class Run:
    """A pushing rank and its engines."""

    def __init__(self, hf_dir: Path, scratch: Path, full_every: int = 0) -> None:
        self.plan = bare_plan(hf_dir, Layout(), torch.bfloat16)
        self.engines = Engines(self.plan.hf_config, [A, B])
        self.weights = random_weights(self.plan, 0)
        self.scratch = scratch / "weights"
        self.push = DeltaPush(
            PushContext(
                plan=self.plan,
                chunks=[],
                buffers=ExportBuffers(),
                rank=0,
                engine_tp=TP,
                engine_device="cpu",
                engine_dtype=torch.bfloat16,
                host="",
                scratch_dir=self.scratch,
                like=hf_dir,
                flush_cache=True,
                full_every_pushes=full_every,
            )
        )

    def prepare(self, version: int) -> None:
        weights = self.weights
        shapes = [tuple(tensor.shape) for tensor in weights.values()]
        dtypes, tensors = [torch.bfloat16] * len(weights), list(weights.values())
        bucket = Bucket(list(weights), dtypes, shapes, torch.empty(0), tensors)
        self.push.prepare(version, [bucket], None)

    def send(self, version: int, engines: Any = None) -> int:
        self.engines.told = []
        to: Any = engines or self.engines
        self.prepare(version)
        return self.push.send(version, (), to, None)

    def step(self, seed: int) -> None:
        """Some rows of some tensors change."""
        fresh = random_weights(self.plan, seed)
        for name in list(fresh)[seed % 3 :: 3]:
            self.weights[name][seed % 2 :: 5] = fresh[name][seed % 2 :: 5]

    def all_right(self) -> bool:
        return all(
            rank.is_of(self.weights) for each in self.engines.ranks.values() for rank in each
        )


@pytest.fixture
def run(tiny_model_dir, tmp_path) -> Run:
    run = Run(tiny_model_dir, tmp_path)
    run.send(1)
    assert run.all_right()
    return run


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 2000),
    st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_every_form_is_exact_to_the_bit(dtype, size, share, small, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.int16 if dtype is torch.bfloat16 else torch.int32
    bounds = torch.iinfo(words)
    old = torch.randint(bounds.min, bounds.max, (size,), generator=generator, dtype=words)
    new = torch.randint(bounds.min, bounds.max, (size,), generator=generator, dtype=words)
    new = old ^ (new & 3) if small else new
    new = torch.where(torch.rand(size, generator=generator) < share, new, old).view(1, -1)
    old = old.view(dtype).view(1, -1)  # any bits: NaNs, infinities, minus zero
    form, payload = encode(new.view(dtype), old)
    target = old.clone()
    apply(form, payload, target)
    assert bits(target).equal(new)
    assert len(payload) <= new.nbytes
    whole = encode(new.view(dtype), None)
    apply(*whole, target.zero_())
    assert whole[0] == WHOLE
    assert bits(target).equal(new)


def test_the_form_is_the_smallest():
    old = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert encode(old, old) == (AT, b"")
    row = old.clone()
    bits(row)[5] ^= 1
    assert encode(row, old)[0] == AT
    assert len(encode(row, old)[1]) < 100
    assert encode((bits(old) ^ 1).view(torch.bfloat16), old)[0] == XOR
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-(2**15), 2**15, (64, 512), generator=generator, dtype=torch.int16)
    assert encode(noise.view(torch.bfloat16), old)[0] == WHOLE


@pytest.mark.parametrize("form", [AT, XOR, WHOLE, "other"])
def test_a_payload_that_does_not_fit_is_refused(form):
    old = torch.zeros(100, dtype=torch.bfloat16)
    new = old + (torch.arange(100) > 90)
    with pytest.raises(ValueError, match=r"\w"):
        apply(form, encode(new, old)[1][:-1] + b"\x01\x02\x03", old)
    with pytest.raises(ValueError, match="not there"):
        apply(AT, encode(new, old)[1], torch.zeros(95, dtype=torch.bfloat16))


def test_only_what_changed_is_written_and_old_versions_go(run):
    whole = sum(
        tensor.nbytes for rank in run.engines.ranks[A] for tensor in rank.parameters.values()
    )
    for version in range(2, 8):
        run.step(version)
        assert run.send(version) < whole / 8
        assert run.engines.told == [(A, "change"), (B, "change")]
        assert run.all_right()
        assert [path.name for path in run.scratch.iterdir()] == [f"version_{version}"]
    assert run.send(8) == 0  # nothing changed, and still it is version 8
    assert run.engines.told == [(A, "change"), (B, "change")]
    run.push.close(run.engines)
    assert not run.scratch.exists()


def test_one_that_missed_a_version_is_given_all_content(run, capsys):
    run.step(2)
    run.engines.deaf = {B}
    with pytest.raises(WeightSyncError, match=rf"{B}: rank 0: no answer"):
        run.send(2)
    run.engines.deaf = set()
    run.step(3)
    run.send(3)
    assert run.engines.told == [(A, "change"), (B, "change"), (B, "all")]
    assert f"{B}: rank 0: it follows version 2 in state " in capsys.readouterr().out
    assert run.all_right()


def test_one_that_was_started_again_is_given_all_content(run, capsys):
    run.engines.ranks[A] = [EngineRank(run.plan.hf_config, rank) for rank in range(TP)]
    run.step(2)
    run.send(2)
    assert run.engines.told == [(A, "change"), (B, "change"), (A, "all")]
    assert "held is no version; all weights follow" in capsys.readouterr().out
    assert run.all_right()
    run.step(3)
    run.send(3)
    assert run.engines.told == [(A, "change"), (B, "change")]
    assert run.all_right()


def test_what_was_prepared_for_a_push_that_failed_is_sent_by_the_next_try(run):
    run.step(2)
    run.prepare(2)  # the engines could not be paused
    run.send(2)
    assert run.engines.told == [(A, "change"), (B, "change")]
    assert run.all_right()


def test_an_answer_to_one_try_is_none_to_the_next(run):
    run.step(2)
    for deaf in (B, A):
        run.engines.deaf = {deaf}
        with pytest.raises(WeightSyncError, match=rf"all weights: {deaf}: rank 0: no answer"):
            run.send(2)
    run.engines.deaf = set()
    run.send(2)
    assert run.engines.told == [(A, "change"), (B, "change")]
    assert run.all_right()


def test_a_newcomer_is_given_the_current_version_and_the_others_follow_it(run):
    """`WeightSync.admit`: a push of the same version to one engine alone."""
    late = Engines(run.plan.hf_config, ["http://late"])
    run.step(2)
    run.send(2)
    size = run.send(2, late)
    assert late.told == [("http://late", "all")]
    assert size == sum(
        t.nbytes for rank in late.ranks["http://late"] for t in rank.parameters.values()
    )
    assert all(rank.is_of(run.weights) for rank in late.ranks["http://late"])
    assert run.send(2, Engines(run.plan.hf_config, ["http://later"])) == size
    run.step(3)
    run.send(3)
    assert run.engines.told == [(A, "change"), (B, "change")]
    assert run.all_right()


def test_a_version_taken_twice_changes_nothing(run, tmp_path):
    run.step(2)
    run.send(2)
    rank = run.engines.ranks[A][0]
    order = {"directory": str(run.scratch / "version_2" / "change"), "rank": 0}
    order |= {"answer": str(tmp_path / "answer")}
    carry_out(order, rank.receiver, rank)
    assert json.loads((tmp_path / "answer").read_text()) == {"wrong": ""}
    assert run.all_right()
    run.step(3)
    run.send(3)
    carry_out(order, rank.receiver, rank)  # late: it may not undo version 3
    assert "No such file" in json.loads((tmp_path / "answer").read_text())["wrong"]
    assert run.all_right()


def damage_payload(directory: Path) -> None:
    content = bytearray((directory / PAYLOAD).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / PAYLOAD).write_bytes(content)


def cut_payload(directory: Path) -> None:
    (directory / PAYLOAD).write_bytes((directory / PAYLOAD).read_bytes()[:-5])


def cut_index(directory: Path) -> None:
    (directory / INDEX).write_bytes((directory / INDEX).read_bytes()[:-5])


def drop_entry(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["entries"].pop(0)
    (directory / INDEX).write_text(json.dumps(index))


def forget_entries(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    del index["entries"]
    (directory / INDEX).write_text(json.dumps(index))


def remove_payload(directory: Path) -> None:
    (directory / PAYLOAD).unlink()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_payload, "its payload is damaged"),
        (cut_payload, "its payload is damaged"),
        (cut_index, "index.json is damaged"),
        (drop_entry, "entries are missing"),
        (forget_entries, "'entries'"),
        (remove_payload, "No such file"),
    ],
)
def test_damage_is_found_and_mended_in_the_same_push(run, monkeypatch, capsys, damage, why):
    ask = DeltaPush._ask

    def damaged(self: Any, written: Any, *rest: Any) -> Any:
        if written.follows is not None:
            damage(written.directory)
        return ask(self, written, *rest)

    monkeypatch.setattr(delta.DeltaPush, "_ask", damaged)
    run.step(2)
    run.send(2)
    assert run.engines.told[:2] == [(A, "change"), (B, "change")]
    assert run.engines.told[2:]
    assert {kind for _, kind in run.engines.told[2:]} == {"all"}
    assert why in capsys.readouterr().out
    assert run.all_right()


def test_parameters_that_somebody_else_changed_are_noticed_and_mended(run, capsys):
    run.step(2)
    name = next(n for n in run.engines.ranks[B][1].parameters if "layernorm" not in n)
    run.engines.ranks[B][1].parameters[name].data[-1] += 1.0
    for each in run.weights.values():
        each.add_(1.0)
    run.send(2)
    assert run.engines.told == [(A, "change"), (B, "change"), (B, "all")]
    assert f"rank 1: {name} is not what it should be" in capsys.readouterr().out
    assert run.all_right()


def test_every_so_many_pushes_all_content_travels(tiny_model_dir, tmp_path):
    run = Run(tiny_model_dir, tmp_path, full_every=3)
    sizes = []
    for version in range(1, 8):
        run.step(version)
        sizes.append(run.send(version))
        assert run.all_right()
    assert [size == max(sizes) for size in sizes] == [True, False, False] * 2 + [True]


def test_a_copy_of_two_versions_is_not_built_upon(run):
    """A push that ends halfway: whatever comes next is all content."""
    run.step(2)
    good, run.weights["lm.head"] = dict(run.weights), torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"lm\.head is not one of"):
        run.send(2)
    run.weights = good
    whole = run.send(2)
    run.step(3)
    assert run.send(3) < whole / 8
    assert run.all_right()
