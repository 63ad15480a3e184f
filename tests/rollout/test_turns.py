"""Episodes of several turns against the real server, as the journal keeps them."""

from pathlib import Path

from rollout.batch import make_batch
from rollout.journal import read_step, write_step
from rollout.types import Group, Status
from tests.rollout.fakes import EchoEnvironment
from tests.rollout.real_episodes import play

NUM_TURNS = 3


def test_turns_of_a_real_policy_keep_their_boundaries_and_masks(engine, chat, tmp_path):
    environments = [EchoEnvironment(seed=0, num_turns=NUM_TURNS) for _ in range(6)]
    samples = play(engine.url, chat, environments, max_new_tokens=300, timeout_s=5.0)
    batch, _ = make_batch(0, [Group(group_id=0, start_version=0, samples=samples)], 1.0)
    _, journaled = read_step(write_step(Path(tmp_path), batch, samples))
    finished = [sample for sample in journaled if sample.status is Status.STOPPED]
    assert finished, "an untrained policy ends some of its replies by chance"
    for sample in finished:
        response = sample.tokens[sample.prompt_length :].tolist()
        expected_mask, starts, rest = [], [], response
        for turn in range(NUM_TURNS):
            starts.append(len(expected_mask))
            length = rest.index(chat.end_id) + 1
            told = chat.tokens(f"q{turn + 1}") if turn + 1 < NUM_TURNS else []
            assert rest[length : length + len(told)] == told
            expected_mask += [1] * length + [0] * len(told)
            rest = rest[length + len(told) :]
        assert not rest
        assert sample.loss_mask.tolist() == expected_mask
        assert sample.turn_starts.tolist() == starts
        written = sample.loss_mask.astype(bool)
        assert (sample.rollout_logprobs[written] < 0).all()
        assert not sample.rollout_logprobs[~written].any()
        assert (sample.versions[written] >= 0).all()
        assert (sample.versions[~written] == -1).all()
