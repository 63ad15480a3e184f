"""Which rank trains which samples in which micro-batch, from lengths and layout alone."""

from framework.batching.plan import UpdatePlan, plan_step

__all__ = ["UpdatePlan", "plan_step"]
