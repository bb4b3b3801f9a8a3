"""Episodic memory: buffers of exemplars."""

from clbench.memory.buffer import Buffer, Exemplars, reservoir_slots

__all__ = ["Buffer", "Exemplars", "reservoir_slots"]
