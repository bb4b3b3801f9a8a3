"""Episodic memory: buffers of exemplars."""

from clbench.memory.buffer import Buffer, Exemplars, reservoir_slots
from clbench.memory.importance import ImportanceMemory

__all__ = ["Buffer", "Exemplars", "ImportanceMemory", "reservoir_slots"]
