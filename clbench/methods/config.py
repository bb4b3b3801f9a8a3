"""Turn `key=value` into a method's frozen Config: types, ranges, choices, and where each value came from."""

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, get_type_hints

from clbench.errors import InputError, unknown_name
from clbench.methods.base import config_fields
from clbench.scenarios.params import read

__all__ = ["make_config"]


def make_config(
    config: type, layers: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Build a Config from layers of values, later layers winning.

    layers: source (`recipe: ...`, `--set`) -> {name: value}; values may be strings as typed on a command line.
    Returns the config and, per field, {"value", "source"}; the source of a default is the field's own `source`.
    Raises InputError for an unknown name, a wrong type or a value out of range; `where` names the method.
    """
    known = config_fields(config)
    hints = get_type_hints(config)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given in layers.items():
        for name, value in given.items():
            if name not in known:
                raise unknown_name(f"hyperparameter of {where}", name, known)
            values[name] = read(hints[name], value, f"hyperparameter {name!r} of {where}")
            check(values[name], known[name], f"hyperparameter {name!r} of {where}")
            sources[name] = source
    made = config(**values)
    report = {
        name: {
            "value": getattr(made, name),
            "source": sources.get(name)
            or "default" + (f": {item.metadata['source']}" if item.metadata.get("source") else ""),
        }
        for name, item in known.items()
    }
    return made, report


def check(value: Any, item: "Field[Any]", what: str) -> None:
    """Raise InputError if `value` is outside the declared range or choices."""
    meta = item.metadata
    choices = meta.get("choices")
    if choices is not None and value not in choices:
        raise unknown_name(f"value for {what}", str(value), map(str, choices))
    if value is None or not isinstance(value, int | float):
        return
    low, high = meta.get("low"), meta.get("high")
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        span = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise InputError(f"{what} is {value}, it must be {span}")
