"""Scenarios: index tables, the builders that make them, presets. Importing this or listing them needs no torch."""

from clbench.scenarios.registry import Preset, build, find, list_scenarios

__all__ = ["Preset", "build", "find", "list_scenarios"]
