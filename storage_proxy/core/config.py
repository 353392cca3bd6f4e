"""Configuration: TOML (tomlkit) into pydantic models, unknown keys refused, samples generated from the same models.

Precedence: command line > environment > file > default. Environment names are `MOORING_` + section + key with double
underscores between (`MOORING_MANAGER_API__PORT=7022`); values are TOML literals or plain text. Keys are written with
dashes and may be read with underscores.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomlkit
import tomlkit.exceptions
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .errors import ConfigError, InvalidIdentifier, InvalidRequest, MooringError
from .ids import ByteSize
from .secrets import Secret, check_private

ENV_PREFIX = "MOORING_"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class ConfigModel(BaseModel):
    """Base of every configuration section: frozen, dashed keys, nothing unknown."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_dashed, populate_by_name=True, arbitrary_types_allowed=True
    )


M = TypeVar("M", bound=ConfigModel)

_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_seconds(value: object) -> object:
    """`"90"`, `"5m"`, `"1h"`, `"7d"`, `"1w"` as seconds; other types are left to the model. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", value.lower())
    if not match:
        raise ValueError("write seconds, or a number with s, m, h, d or w as in 1h")
    return float(match[1]) * _TIME_UNITS[match[2] or "s"]


def _parse_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return int(ByteSize.parse(value))
    except InvalidIdentifier as err:
        raise ValueError(str(err)) from None


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
"""A duration: 90, "90s", "5m", "1h", "7d", "1w"."""

Size = Annotated[int, BeforeValidator(_parse_size), Field(gt=0)]
"""A number of bytes: 1048576, "1m", "100 GiB" (powers of 1024)."""


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses: what is sent there does not leave this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_config(
    model: type[M],
    path: Path | None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,  # Any: TOML values
) -> M:
    """Reads and validates a file. A file that holds secrets must be private (mode 0600).

    Raises `ConfigError` naming the file, the key and the remedy.
    """
    data: dict[str, Any] = {}
    where = str(path) if path else "the environment"
    if path is not None:
        try:
            data = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
        except FileNotFoundError:
            raise ConfigError(
                f"Configuration file {path} does not exist.", hint="Start from the samples in configs/."
            ) from None
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"Configuration file {path} cannot be read: {err}.") from None
        except tomlkit.exceptions.TOMLKitError as err:
            raise ConfigError(f"Configuration file {path} is not valid TOML: {err}.") from None
    data = _merge(
        _by_alias(model, data), _by_alias(model, _from_environment(os.environ if environ is None else environ))
    )
    data = _merge(data, _by_alias(model, dict(overrides or {})))
    try:
        config = model.model_validate(data)
    except ValidationError as err:
        raise ConfigError(f"In {where}: {describe(err)}.", hint="See docs/configuration.md.") from None
    if path is not None and any(True for _ in _secrets_in(config)):
        check_private(path)
    return config


def describe(err: ValidationError) -> str:
    """One line that names each wrong key and why, without the value (it may be a secret)."""
    parts = []
    for item in err.errors(include_input=False, include_url=False):
        place = ".".join(str(step) for step in item["loc"]) or "the whole"
        text = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {text}")
    return "; ".join(parts)


def parse_request(model: type[RequestT], data: object) -> RequestT:
    """Validates data from outside; raises `InvalidRequest` whose detail maps each field to what is wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as err:
        errors = err.errors(include_input=False, include_url=False)
        for item in errors:  # an error of our own tree raised inside a validator keeps its class
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, MooringError):
                raise cause from None
        fields = {".".join(str(step) for step in item["loc"]) or "body": item["msg"] for item in errors}
        raise InvalidRequest(f"The request is not valid: {describe(err)}.", detail=fields) from None


RequestT = TypeVar("RequestT", bound=BaseModel)


def _by_alias(model: type[BaseModel], data: Any) -> Any:
    """The same data with the dashed spelling of every known key; names in maps of sections are left as they are."""
    if not isinstance(data, Mapping):
        return data
    result: dict[str, Any] = {}
    for key, value in data.items():
        info = model.model_fields.get(key.replace("-", "_"))
        if info is None:
            result[key] = value
            continue
        sub, is_map = _submodel(info.annotation)
        if sub is not None and is_map and isinstance(value, Mapping):
            value = {name: _by_alias(sub, item) for name, item in value.items()}
        elif sub is not None:
            value = _by_alias(sub, value)
        result[_dashed(key)] = value
    return result


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or "__" not in name:
            continue
        *sections, key = (_dashed(part.lower()) for part in name.removeprefix(ENV_PREFIX).split("__"))
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[key] = tomlkit.parse(f"x = {text}").unwrap()["x"]
        except tomlkit.exceptions.TOMLKitError:
            place[key] = text
    return result


def _secrets_in(value: object) -> Iterator[Secret]:
    if isinstance(value, Secret):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _secrets_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets_in(item)


# --- samples and documentation, generated from the models -------------------------------------------------------------


def sample(model: type[ConfigModel], *, title: str) -> str:
    """A commented TOML sample: every key with its description, defaults commented out, required keys as examples."""
    lines = [f"# {title}", "# Generated from the configuration models; edit a copy. Files with secrets: chmod 600.", ""]
    lines += _sample_section(model, ())
    return "\n".join(lines).rstrip() + "\n"


def _sample_section(model: type[BaseModel], path: tuple[str, ...], *, off: bool = False) -> list[str]:
    """`off`: a named section that nobody needs to have, so the example of it is commented out as a whole."""
    lines: list[str] = []
    nested: list[tuple[tuple[str, ...], type[BaseModel], FieldInfo]] = []
    for name, info in model.model_fields.items():
        sub, is_map = _submodel(info.annotation)
        if sub is not None:
            nested.append(((*path, _dashed(name), *(("NAME",) if is_map else ())), sub, info))
            continue
        lines += [f"# {line}" for line in _description(info)]
        value, required = _example(info)
        lines.append(f"{'' if required and not off else '# '}{_dashed(name)} = {value}")
    for sub_path, sub, info in nested:
        shown = [("example" if step == "NAME" else step) for step in sub_path]
        spare = off or (sub_path[-1] == "NAME" and not info.is_required())
        lines += ["", *[f"# {line}" for line in _description(info)], f"{'# ' if spare else ''}[{'.'.join(shown)}]"]
        lines += _sample_section(sub, sub_path, off=spare)
    return lines


def reference(model: type[ConfigModel]) -> str:
    """The same keys as Markdown tables, one per section."""
    blocks: list[str] = []
    _reference_section(model, (), blocks)
    return "\n".join(blocks).rstrip() + "\n"


def _reference_section(model: type[BaseModel], path: tuple[str, ...], blocks: list[str]) -> None:
    rows, nested = [], []
    for name, info in model.model_fields.items():
        sub, is_map = _submodel(info.annotation)
        if sub is not None:
            nested.append(((*path, _dashed(name), *(("NAME",) if is_map else ())), sub))
            continue
        value, required = _example(info)
        text = " ".join(_description(info)).replace("|", "\\|")
        rows.append(f"| `{_dashed(name)}` | {'required' if required else f'`{value}`'} | {text} |")
    if rows:
        head = f"`[{'.'.join(path)}]`" if path else "top level"
        blocks += [f"### {head}", "", "| key | default | meaning |", "|---|---|---|", *rows, ""]
    for sub_path, sub in nested:
        _reference_section(sub, sub_path, blocks)


def _description(info: FieldInfo) -> list[str]:
    return (info.description or "").split("\n") if info.description else []


def _example(info: FieldInfo) -> tuple[str, bool]:
    if info.is_required():
        example = (info.examples or ["..."])[0]
        return _toml(example), True
    default = info.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        return _toml((info.examples or [""])[0]), False
    return _toml(default), False


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(int(value)) if isinstance(value, int) else str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)


def _submodel(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """(section model, is it a map of named sections) behind an annotation, or (None, False)."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for arg in typing.get_args(annotation):
            found = _submodel(arg)
            if found[0] is not None:
                return found
        return None, False
    if origin is typing.Annotated:
        return _submodel(typing.get_args(annotation)[0])
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _submodel(typing.get_args(annotation)[1])[0], True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    return None, False
