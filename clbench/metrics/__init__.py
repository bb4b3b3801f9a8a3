"""Metrics: pure numpy functions of the accuracy matrix and of the per-iteration hits table."""

from clbench.metrics.curve import Curve
from clbench.metrics.levels import per_level
from clbench.metrics.registry import Metric, find_metric, list_metrics
from clbench.metrics.seeds import Aggregate, aggregate, t_quantile
from clbench.metrics.summary import summarise

__all__ = [
    "Aggregate",
    "Curve",
    "Metric",
    "aggregate",
    "find_metric",
    "list_metrics",
    "per_level",
    "summarise",
    "t_quantile",
]
