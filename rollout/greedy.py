"""A greedy answer to every prompt, whose reward is the others' baseline."""

from dataclasses import replace

from rollout.boundary import failed_sample
from rollout.generate import Episode, Generator
from rollout.together import run_together
from rollout.types import Sample, Status


async def run_with_baseline(
    generator: Generator, episodes: list[Episode], version: int
) -> list[Sample]:
    """Samples of all episodes of a prompt but the last, whose greedy answer is their baseline.

    ReMax (arXiv 2310.10505). Where that one fails nothing is known to compare with: all fail.
    Where a program plays and gives several samples of an episode, their mean reward counts.
    """
    greedy = replace(generator, sampling=replace(generator.sampling, temperature=0.0))
    samples, baselines = await run_together(
        [generator.run(episodes[:-1], version), greedy.run(episodes[-1:], version)]
    )
    failed = [each for each in baselines if each.status is Status.FAILED]
    if failed:
        reason = f"the greedy answer: {failed[0].metadata['error']}"
        return [failed_sample(sample, reason) for sample in samples]
    reward = sum(each.reward for each in baselines) / len(baselines)
    return [replace(sample, baseline_reward=reward) for sample in samples]
