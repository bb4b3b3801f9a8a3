"""Evaluation at every iteration: counts on the device, numbers on the host."""

from clbench.evaluator.evaluator import Evaluator, FullResult
from clbench.evaluator.schedule import Schedule, fit_schedule

__all__ = ["Evaluator", "FullResult", "Schedule", "fit_schedule"]
