"""Parameters of a scenario builder: declared once, as fields of a frozen dataclass, and read from the command line.

    @dataclass(frozen=True)
    class Params:
        tasks: int = param(5, "number of tasks", low=1)

Types that can be read from text: bool, int, float, str, Literal, `tuple[X, ...]` ("0,1,2"), and `X | None` ("none").
"""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clbench.errors import InputError, unknown_name

__all__ = ["change", "param", "param_table", "read"]

P = TypeVar("P")

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    replaces: Sequence[str] = (),
) -> Any:
    """Declare a parameter. low, high: closed range; below: open upper bound. replaces: parameters that go back to their
    defaults when this one is given without them (`tasks` against `init` and `increment`)."""
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "below": below, "replaces": tuple(replaces)},
    )


def change(params: P, given: Mapping[str, Any], where: str) -> P:
    """Return `params` with the values of `given`, which may be text from a command line.

    Raises InputError for an unknown name, a value of the wrong type or one outside its range; `where` begins it.
    """
    cls = type(params)
    hints = param_types(cls, where)
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in hints:
            raise unknown_name(f"parameter of {where}", name, hints)
        changed[name] = read(hints[name], value, f"{where}: {name}")
    for item in fields(cls):  # type: ignore[arg-type]  # param_types has checked that cls is a dataclass
        if item.name in changed:
            check_range(item.metadata, changed[item.name], f"{where}: {item.name}")
            for other in item.metadata.get("replaces", ()):
                if other not in given:
                    changed[other] = cls.__dataclass_fields__[other].default  # type: ignore[attr-defined]  # as above
    return replace(params, **changed)  # type: ignore[type-var]  # as above


def param_types(cls: type, where: str) -> dict[str, Any]:
    """Parameter names and their types; InputError if the class cannot be used."""
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise InputError(f"{where}: Params must be a frozen dataclass")
    for item in fields(cls):
        if item.default is MISSING:
            raise InputError(f"{where}: parameter {item.name!r} needs a default: declare it with param(default, help)")
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def param_table(params: Any) -> list[dict[str, Any]]:
    """One row per parameter: name, type, value, default, help."""
    hints = param_types(type(params), type(params).__qualname__)
    return [
        {
            "name": item.name,
            "type": type_text(hints[item.name]),
            "value": getattr(params, item.name),
            "default": item.default,
            "help": item.metadata.get("help", ""),
        }
        for item in fields(params)
    ]


def check_range(metadata: Mapping[str, Any], value: Any, what: str) -> None:
    if value is None or isinstance(value, bool | str | tuple):
        return
    low, high, below = (metadata.get(key) for key in ("low", "high", "below"))
    if (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (below is not None and value >= below)
    ):
        bounds = [
            f"at least {low}" if low is not None else "",
            f"at most {high}" if high is not None else "",
            f"below {below}" if below is not None else "",
        ]
        raise InputError(f"{what} must be {' and '.join(filter(None, bounds))}, not {value}")


def read(hint: Any, value: Any, what: str) -> Any:
    """Turn `value` into the type `hint`, or raise InputError."""
    try:
        return convert(hint, value)
    except ValueError:
        words = literal_words(hint)
        if words and isinstance(value, str):
            raise unknown_name(f"value of {what}", value, words, or_else(hint)) from None
        raise InputError(f"{what} must be {type_text(hint)}, not {value!r}") from None


def convert(hint: Any, value: Any) -> Any:
    """Turn `value` into the type `hint`; ValueError if that cannot be done without guessing."""
    origin, args = get_origin(hint), get_args(hint)
    text = value.strip() if isinstance(value, str) else None
    if origin in (Union, types.UnionType):
        for part in sorted(args, key=lambda part: part is not types.NoneType):  # "none" is never another type's text
            try:
                return convert(part, value)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        return one_of(args, text if text is not None else value)
    if origin is tuple:
        if text is not None:
            inner = text.removeprefix("[").removesuffix("]").strip()
            value = inner.split(",") if inner else []
        if not isinstance(value, list | tuple):
            raise ValueError
        return tuple(convert(args[0], part) for part in value)
    if hint is types.NoneType:
        if value is None or (text is not None and text.lower() in ("none", "null")):
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
    elif hint is int:
        if (isinstance(value, int) and not isinstance(value, bool)) or text is not None:
            return int(value)
    elif hint is float:
        if (isinstance(value, int | float) and not isinstance(value, bool)) or text is not None:
            number = float(value)
            if math.isfinite(number):
                return number
    elif hint is str and isinstance(value, str):
        return value
    raise ValueError


def one_of(choices: Sequence[Any], value: Any) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ValueError


def literal_words(hint: Any) -> list[str]:
    """The words that `hint` accepts."""
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if isinstance(word, str)]
    return [word for part in get_args(hint) for word in literal_words(part)]


def or_else(hint: Any) -> str:
    rest = [type_text(part) for part in get_args(hint) if get_origin(hint) is not Literal and not literal_words(part)]
    return f"(or {' or '.join(rest)})" if rest else ""


def type_text(hint: Any) -> str:
    """What a value may be, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in args)
    if origin is Literal:
        return " or ".join(repr(word) for word in args)
    if origin is tuple:
        return "a list like 0,1,2" if args[0] is int else "a list with commas"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "none"}
    return names.get(hint, str(hint))
