"""Episodes that programs of the user's own play, instead of an environment's turns.

`engine.py`: the policy as such a program sees it, and the seam `data.generate` names.
`black_box.py`, `endpoint.py`, `session.py`, `protocol.py`: agents that speak OpenAI's protocol.
"""

import inspect

from rollout.agents.engine import AgentTask, GenerateFunction, PolicyEngine, replies_of
from rollout.own_code import import_own

__all__ = ["AgentTask", "GenerateFunction", "PolicyEngine", "find_generate", "replies_of"]


def find_generate(name: str) -> GenerateFunction:
    """A function of the user's own: package.module.function.

    Raises:
        ValueError: there is none such, or it is no `async def` of (engine, task, sampling); one
            line, without the key.
    """
    if "." not in name:
        raise ValueError("must be environment, agent, or package.module.function")
    found = import_own(name)
    if not inspect.iscoroutinefunction(found):
        raise ValueError("is not an `async def` of (engine, task, sampling)")
    try:
        inspect.signature(found).bind("engine", "task", "sampling")
    except TypeError as error:
        raise ValueError(f"must take (engine, task, sampling): {error}") from None
    return found
