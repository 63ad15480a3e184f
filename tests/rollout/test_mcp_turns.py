"""The calculator with an MCP server's tool: a real policy, a real server, and what is trained."""

from rollout.environments.arithmetic import evaluate
from rollout.types import Status
from tests.rollout.mcp_calculator import EveryReplyCalls
from tests.rollout.real_episodes import play


def test_what_the_server_says_is_what_the_policy_is_told_and_not_trained_on(engine, chat):
    # An untrained policy ends its replies by chance, most of them early.
    environments = [EveryReplyCalls(seed=0, max_calls=1) for _ in range(48)]
    samples = play(engine.url, chat, environments, max_new_tokens=120, timeout_s=30.0)
    assert not [sample.metadata for sample in samples if sample.status is Status.FAILED]
    told = 0
    for sample in (each for each in samples if len(each.turn_starts) > 1):
        told += 1
        response, second = sample.tokens[sample.prompt_length :].tolist(), sample.turn_starts[1]
        end = response.index(chat.end_id)
        said = chat.text(response[:end])
        try:
            result = str(evaluate(said))
        except ValueError:
            result = "error"
        assert chat.text(response[end + 1 : second]).startswith(f"={result}|"), said
        assert sample.loss_mask[: end + 1].all()
        assert not sample.loss_mask[end + 1 : second].any()
    assert told > 5, "an untrained policy ends some of its replies by chance"
