"""The stream: which rows a method gets at which iteration."""

from clbench.stream.stream import Plan, Stream
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["Batch", "Cursor", "Phase", "Plan", "Stream"]
