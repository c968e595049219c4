"""Dataclasses whose fields pydantic checks, and what it refuses in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qk.errors import QkError, fail

STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)
Kind = TypeVar("Kind", bound=type)


def refuses_in_words(kind: Kind) -> Kind:
    """Makes the constructor of a pydantic dataclass raise QkError for fields that do not fit."""
    init = kind.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        try:
            init(self, *args, **fields)
        except ValidationError as error:
            raise refusal(kind, error, kind.__name__) from None

    kind.__init__ = checked
    return kind


def parsed(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    """data as `kind`. Raises QkError for fields that do not fit."""
    if not isinstance(data, Mapping):
        raise fail(where, "it", f"a mapping of the fields of {kind.__name__}", type(data).__name__)
    try:
        return TypeAdapter(kind).validate_python(dict(data))
    except ValidationError as error:
        raise refusal(kind, error, where) from error


def refusal(kind: Any, error: ValidationError, where: str) -> QkError:
    """Names every field that does not fit; for one that is unknown, those that there are."""
    found = error.errors()
    lines = []
    for e in found:
        name = ".".join(map(str, e["loc"]))
        text = e["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        text = text.replace("Unexpected", "is an unexpected", 1).rstrip(".")
        lines.append(f"{name} {text[0].lower()}{text[1:]}, got {e['input']!r}" if name else text)
    holders = dict.fromkeys(_holder(kind, e["loc"]) for e in found if e["type"].startswith("unexpected"))
    advice = "".join(f" The fields are: {', '.join(holder.__dataclass_fields__)}." for holder in holders)
    return QkError(f"{where}: {'; '.join(lines)}.{advice}")


def _holder(kind: Any, place: tuple[int | str, ...]) -> Any:
    """The dataclass that a field at `place` of one of `kind` would belong to: itself, or that of a field of its own."""
    for name in place[:-1]:
        hint = get_type_hints(kind).get(str(name))
        kind = next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), kind)
    return kind
