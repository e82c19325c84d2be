"""What of the package is public: ``depthmix.__all__`` and what the pages of docs/api show; and what it lacks.

Used by ``tests/test_public_api.py`` and, for what needs transformers, ``tests/hf/test_public_api.py``.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType, ModuleType

import depthmix

ROOT = Path(__file__).parents[2]
NEEDS_TRANSFORMERS = ("depthmix.hf.", "depthmix.adapters.huggingface")
SHAPE = re.compile(r"(?<![\w\]])\[(?:[\w*.+/' -]+(?:, [\w*.+/' -]+)*)?\]")
"""``[B, T, D]``, ``[*, D]``, ``[..., n, D]``, ``[T / k]``, ``[]``; not the brackets of ``list[int]``."""
TENSORS = re.compile(r"\b(Tensor|State|Parameter)\b")


def documented() -> dict[str, list[str] | None]:
    """What docs/api shows: name -> members that are asked for, ``None`` for all that it has."""
    found: dict[str, list[str] | None] = {}
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for name, options in re.findall(
            r"^::: (\S+)\n((?: +.*\n?)*)", page.read_text(encoding="utf-8"), re.M
        ):
            if re.search(r"members: false", options):
                continue
            members = re.search(r"members: \[(.*?)\]", options)
            found[name] = members[1].split(", ") if members else None
    return found


def resolve(name: str):
    """The module, class or function of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


def callables(transformers: bool) -> dict[str, tuple[object, type | None]]:
    """Every public function, class and method by name, methods with their class."""
    things = {}
    if not transformers:
        things |= {f"depthmix.{name}": getattr(depthmix, name) for name in depthmix.__all__}
    for name, members in documented().items():
        if name.startswith(NEEDS_TRANSFORMERS) == transformers:
            thing = resolve(name)
            if members is None:
                things[name] = thing
            else:
                things |= {f"{name}.{member}": getattr(thing, member) for member in members}
    found = {}
    for name, thing in things.items():
        for inner, (value, owner) in _within(name, thing, None).items():
            if not any(value is other for other, _ in found.values()):
                found[inner] = value, owner
    return found


def _within(name: str, thing, owner: type | None) -> dict[str, tuple[object, type | None]]:
    found = {}
    if isinstance(thing, ModuleType):
        for key, value in vars(thing).items():
            own = getattr(value, "__module__", None) == thing.__name__
            if own and not key.startswith("_") and isinstance(value, FunctionType | type):
                found |= _within(f"{name}.{key}", value, None)
    elif isinstance(thing, type):
        found[name] = thing, None
        for base in thing.__mro__:
            if not base.__module__.startswith("depthmix."):
                continue
            for key, value in vars(base).items():
                plain = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if (
                    isinstance(plain, FunctionType)
                    and not key.startswith("_")
                    and f"{name}.{key}" not in found
                ):
                    found[f"{name}.{key}"] = plain, base
    elif callable(thing):
        found[name] = thing, owner
    return found


def lacks(thing, owner: type | None) -> list[str]:
    """What a reader would miss: a docstring, annotations, or the shapes of its tensors."""
    missing = []
    if isinstance(thing, type):
        text, function = inspect.getdoc(thing) or "", vars(thing).get("__init__")
        if function is not None and "__dataclass_fields__" not in vars(thing):
            missing += _unannotated(function)
        return missing + ([] if text else ["docstring"])
    own = inspect.unwrap(thing)
    text = _text(own, owner)
    missing += [] if text else ["docstring"]
    missing += _unannotated(own)
    if own.__name__ != "__init__" and "return" not in own.__annotations__:
        missing.append("annotation of what is returned")
    said = " ".join(map(_said, own.__annotations__.values()))
    if TENSORS.search(said) and not SHAPE.search(text):
        missing.append("shape")
    return missing


def _text(function: FunctionType, owner: type | None) -> str:
    """Its docstring, or that of what it takes the place of: where it has tensors, one of this package."""
    for base in owner.__mro__ if owner is not None else ():
        inherited = vars(base).get(function.__name__)
        inherited = (
            inherited.fget if isinstance(inherited, property) else getattr(inherited, "__func__", inherited)
        )
        if text := getattr(inherited, "__doc__", None):
            return inspect.cleandoc(text)
    return inspect.cleandoc(function.__doc__ or "")


def _said(annotation) -> str:
    return (
        annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") + repr(annotation)
    )


def _unannotated(function: FunctionType) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    return [f"annotation of {p.name}" for p in parameters if p.annotation is p.empty]
