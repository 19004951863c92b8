"""Typed configs of jobs: read them from YAML, --set and flags, name every wrong key, and explain the keys."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

Config = TypeVar("Config", bound="JobConfig")


class JobConfig(BaseModel):
    """Base class of every job's config: immutable; it refuses unknown keys, NaN and infinity.

    Every key has a description of one sentence. A config made in Python (`TrainConfig(model=...)`) converts types as
    pydantic does; `load_config`, which reads what people type, is strict: "3" is not 3, and 1 is not true.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """Return all keys and values as YAML, which `load_config` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping as `yaml.SafeLoader` does; raise ConstructorError for a key that occurs twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None and twice != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"the duplicate key {twice!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(cls: type[Config], file: Path | str | None = None, sets: Iterable[str] = (), **given: Any) -> Config:
    """Make a `cls` from a YAML file, `sets` ("key=value") and keyword arguments; each overrides those before it.

    Keys in `sets` and keyword arguments are dotted (bt.lr).

    Raises:
        ValueError: naming the file, the key, the nearest known key, the expected type and what came.
    """
    values: dict[str, Any] = {} if file is None else _read_yaml(Path(file))
    for entry in sets:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set: expected key=value, got {entry!r}")
        _put(values, key.strip().split("."), read_value(text))
    for key, value in given.items():
        _put(values, key.split("."), value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
    _refuse_unwritable(values)
    try:
        # validate JSON: only there does pydantic's strict mode accept a string for a path and a list for a tuple
        return cls.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        overridden = [*(entry.partition("=")[0].strip() for entry in sets), *given]
        sentences = _explained(cls, error)
        in_file = file is not None and not any(
            f"{key}.".startswith(f"{other}.") for key in sentences for other in overridden
        )
        raise ValueError((f"{file}: " if in_file else "") + "; ".join(sentences.values())) from None


def read_value(text: str) -> Any:
    """What `--set KEY=text` sets: the text read as YAML, or the text itself if it is none."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def _refuse_unwritable(values: dict[str, Any]) -> None:
    """Raise ValueError for a value that JSON cannot hold."""
    for key, value in values.items():
        try:
            json.dumps({key: value}, default=str, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key}: expected UTF-8 text, got {value!a}") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{key}: expected a plain value, got YAML that contains itself or is too deep") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"config {file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config {file}: expected YAML, got {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config {file}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, key in enumerate(path[:-1]):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a group of keys")
        values = inner
    values[path[-1]] = value


def config_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a config class; a group is replaced by its keys."""
    keys = []
    for name, field in cls.model_fields.items():
        group = _group(field.annotation)
        keys += [prefix + name] if group is None else config_keys(group, f"{prefix}{name}.")
    return keys


def flag_name(key: str) -> str:
    """The flag of a key, without its hyphens: reward.source -> reward, stop_when -> stop-when. A key that would be a
    word of Python's has an underscore behind it, its flag none: as_ -> as."""
    return key.partition(".")[0].rstrip("_").replace("_", "-")


def config_field(cls: type[BaseModel], key: str) -> FieldInfo:
    """Return the field of a dotted key."""
    name, _, rest = key.partition(".")
    field = cls.model_fields[name]
    group = _group(field.annotation)
    return field if group is None or not rest else config_field(group, rest)


def config_default(cls: type[BaseModel], key: str) -> str | None:
    """Return the default of a dotted key as YAML on one line; None for a key that needs a value."""
    values: Any = _defaults(cls)
    for name in key.split("."):
        if name not in values:
            return None
        values = values[name]
    return _line(name, values).partition(": ")[2]


def config_template(cls: type[JobConfig]) -> str:
    """Return a YAML file to start from: each key with its description, default and allowed values.

    Keys without a default come first, marked "needed"; with them filled in, `load_config` reads the defaults back.
    """
    fields = sorted(cls.model_fields, key=lambda name: not cls.model_fields[name].is_required())
    return _template(cls, _defaults(cls), fields, "")


def _defaults(cls: type[BaseModel]) -> dict[str, Any]:
    return cls.model_construct().model_dump(mode="json", warnings=False)


def _line(name: str, value: Any) -> str:
    """Return "name: value" as YAML, a list in brackets."""
    flow = None if isinstance(value, list) else False
    return yaml.safe_dump({name: value}, default_flow_style=flow, width=math.inf, allow_unicode=True).rstrip()


def _template(cls: type[BaseModel], values: dict[str, Any], names: Iterable[str], indent: str) -> str:
    text = ""
    for name in names:
        field = cls.model_fields[name]
        group = _group(field.annotation)
        text += "" if group is None else "\n"
        text += f"{indent}# {field.description}\n"
        if group is not None:
            text += f"{indent}{name}:\n{_template(group, values[name], group.model_fields, indent + '  ')}"
        elif field.is_required():
            text += f"{indent}{name}:  # needed: {allowed_values(field)}\n"
        else:
            text += f"{indent}{_line(name, values[name])}  # {allowed_values(field)}\n"
    return text


def allowed_values(field: FieldInfo) -> str:
    """Return the values that a key accepts, such as "a whole number >= 1 or null"."""
    return _described(field.annotation, field.metadata)


def _group(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _nearest(cls: type[BaseModel], key: str) -> str:
    keys = config_keys(cls)
    groups = {k.rpartition(".")[0] for k in keys if "." in k}
    near = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.6)
    if not near:  # `lr` for `bt.lr`: the right name in another group
        last = key.rpartition(".")[2]
        tails: dict[str, str] = {}
        for known in keys:
            tails.setdefault(known.rpartition(".")[2], known)
        near = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)]
    return f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "str_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a group of keys",
    "path_type": "a path",
}


def _explained(cls: type[BaseModel], error: ValidationError) -> dict[str, str]:
    """Return key -> sentence. For a union pydantic reports every alternative; one sentence names them all."""
    sentences: dict[str, str] = {}
    for detail in error.errors():
        key, alternatives = _place(cls, detail["loc"])
        if key not in sentences:
            sentences[key] = _explain(cls, key, detail, " or ".join(map(_described, alternatives)))
    return sentences


def _place(cls: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """Return the dotted key, and the union's alternatives if `loc` continues with pydantic's name of one of them."""
    key: list[str] = []
    annotation: Any = cls
    for part in loc:
        members = (
            [a for a in get_args(annotation) if a is not NoneType]
            if get_origin(annotation) in (Union, UnionType)
            else []
        )
        if len(members) > 1:
            return ".".join(key), members
        annotation = members[0] if members else annotation
        field = (
            annotation.model_fields.get(part)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel)
            else None
        )
        annotation = None if field is None else field.annotation
        key.append(str(part))
    return ".".join(key), []


def _described(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    kind, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if kind in (Union, UnionType):
        return " or ".join(_described(member, constraints) for member in arguments)
    if kind is Literal:
        *others, last = map(repr, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if kind is Annotated:
        return _described(arguments[0], [bound for note in arguments[1:] for bound in getattr(note, "metadata", ())])
    if kind is tuple:
        return f"a list of {_described(arguments[0]).removeprefix('a ')}s"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f" {sign} {getattr(c, name)}" for c in constraints for name, sign in signs.items() if hasattr(c, name)]
    return _EXPECTED.get(f"{annotation.__name__.lower()}_type", str(annotation)) + ",".join(bounds)


def _explain(cls: type[BaseModel], key: str, detail: Any, expected: str | None) -> str:
    kind, got = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key!r}: {_nearest(cls, key)}"
    if kind == "missing":
        return f"{key}: a value is needed"
    if kind in ("value_error", "assertion_error"):  # from our own validators
        message = str(detail["msg"]).removeprefix("Value error, ")
        message = message.removeprefix(
            f"{key.rpartition('.')[2]}: "
        )  # the validator called a function with an argument of that name
        return f"{key}: {message}" if key else message
    if kind.startswith(("greater_than", "less_than")):
        expected = allowed_values(config_field(cls, key))
    expected = expected or _EXPECTED.get(kind) or re.sub(r"^Input should be ", "", str(detail["msg"]))
    shown = json.dumps(got, ensure_ascii=False, default=str)
    return f"{key}: expected {expected}, got {shown} ({type(got).__name__})"
