"""One file of model code, for a folder that transformers loads without depthmix (``trust_remote_code=True``).

The file is written by no hand. Starting from the classes of :mod:`depthmix.hf`, every definition that they reach in the
package's sources is taken as it stands, with its comments, and put into one file: of connections the one that the model
has. Where the sources call a kernel, the file calls the equation (:mod:`depthmix.exchange.plain`). Left out are methods
that only a trainer, a pipeline or a diagnosis calls (:data:`UNUSED`).

A definition that ends up under another name, because two modules have one of that name, is renamed wherever it is used.
"""

import ast
import builtins
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ..config import GPTConfig
from ..residuals import registry
from .fields import FIELDS

PACKAGE = __package__.rpartition(".")[0]
_HF, _PLAIN = f"{PACKAGE}.hf", f"{PACKAGE}.exchange.plain"
ROOTS = tuple((f"{_HF}.modeling", f"Depthmix{name}") for name in ("ForCausalLM", "Model"))

UNUSED = frozenset(
    "send receive gates mix begin_gates begin_mix without unchanged foresee optimizer_group streams gate_values "
    "gate_summary crossing extra_repr drawn_weights".split()
)
"""Methods that are left out of every class."""

_UNUSED_OF = {
    ("ops.hyper", "HyperDynamic"): {"weight", "coefficients", "backward"},
    ("ops.hyper", "Manifold"): {"weight", "coefficients", "backward"},
    ("model", "Attention"): {"forward"},
}

_IN_PLACE_OF = {
    ("exchange.fields", "make_config"): "make_config",
    ("model", "step_and_norm"): "step_and_norm",
    ("hf.modeling", "foresee"): "foresee",
    ("functional", "rms_norm"): "rms_norm",
    ("functional", "add_rms_norm"): "add_rms_norm",
    ("functional", "relu_squared"): "relu_squared",
    ("functional", "multi_gate_residual"): "multi_gate_residual",
    ("functional", "attention_pool"): "attention_pool",
    ("functional", "source_pool"): "source_pool",
    ("functional", "source_pool_many"): "source_pool_many",
    ("functional", "read_depth_memory"): "read_depth_memory",
    ("functional", "extend_depth_memory"): "extend_depth_memory",
    ("ops.channel_gate", "gated_update"): "gated_update",
    ("ops.weighted_sum", "weighted_sum"): "weighted_sum",
    ("ops.hyper", "begin"): "hyper_begin",
    ("ops.hyper", "step"): "hyper_step",
    ("ops.hyper", "write"): "hyper_write",
    ("ops.hyper", "read"): "hyper_read",
    ("ops.hyper", "static_step"): "hyper_static_step",
    ("ops.sinkhorn", "sinkhorn"): "sinkhorn",
    ("residuals.mgr", "ReplaySite"): "NotHere",
    ("residuals.mgr", "InversionSite"): "NotHere",
    ("ops.inversion", "Fallback"): "fallback",
}

Key = tuple[str, str]
"""Module and name of a definition."""


@dataclass
class _Module:
    """The top level of one source file."""

    name: str
    source: bytes = b""
    starts: list[int] = field(default_factory=list)
    definitions: dict[str, list[ast.stmt]] = field(default_factory=lambda: defaultdict(list))
    names: dict[str, Key] = field(default_factory=dict)
    """What ``from .x import y`` of the package binds."""
    modules: dict[str, str] = field(default_factory=dict)
    """What binds a whole module of the package."""
    outside: dict[str, str] = field(default_factory=dict)
    """Name -> the import statement of another package that binds it."""

    @classmethod
    def read(cls, name: str) -> "_Module":
        file = _source(name)
        text = file.read_text(encoding="utf-8")
        made = cls(name, text.encode())
        made.starts = [0]
        for line in made.source.splitlines(keepends=True):
            made.starts.append(made.starts[-1] + len(line))
        for node in ast.parse(text).body:
            made._take(node, name if file.name == "__init__.py" else name.rpartition(".")[0])
        return made

    def _take(self, node: ast.stmt, parent: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.definitions[node.name].append(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self.definitions[node.targets[0].id].append(node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.definitions[node.target.id].append(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                self.outside[bound] = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        elif isinstance(node, ast.ImportFrom):
            base = parent.rsplit(".", node.level - 1)[0] if node.level > 1 else parent
            origin = ".".join(filter(None, [base if node.level else None, node.module]))
            for alias in node.names:
                bound = alias.asname or alias.name
                if not origin.startswith(PACKAGE):
                    renamed = f" as {alias.asname}" if alias.asname else ""
                    self.outside[bound] = f"from {origin} import {alias.name}{renamed}"
                elif _file(f"{origin}.{alias.name}") is not None:
                    self.modules[bound] = f"{origin}.{alias.name}"
                else:
                    self.names[bound] = (origin, alias.name)

    def place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node) -> tuple[int, int]:
        line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return self.starts[line - 1], self.place(node.end_lineno, node.end_col_offset)


def _file(name: str) -> Path | None:
    """The source of a module of the package. Nothing is imported: what is gathered may need what is not installed."""
    place = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.exists()), None)


def _source(name: str) -> Path:
    file = _file(name)
    if file is None:
        raise ValueError(f"the package has no module {name} whose source could be gathered")
    return file


@dataclass
class _Use:
    """One place where a definition uses another."""

    start: int
    end: int
    key: Key
    at_once: bool
    """Whether the other must be there when this one is made: a base class, a default, a decorator."""


class _Reader(ast.NodeVisitor):
    """What one definition uses, and which names it binds inside."""

    def __init__(self, gathering: "_Gathering", module: _Module, node: ast.stmt):
        self.gathering, self.module = gathering, module
        self.uses: list[_Use] = []
        self.outside: set[str] = set()
        self.bound: set[str] = set()
        self.dropped: list[tuple[int, int]] = []
        self._scopes: list[set[str]] = []
        self.unused = set(UNUSED)
        if isinstance(node, ast.ClassDef):
            short = module.name.removeprefix(PACKAGE + ".")
            self.unused |= _UNUSED_OF.get((short, node.name), set())
        self.visit(node)

    def _resolve(self, name: str) -> Key | None:
        if any(name in scope for scope in self._scopes):
            return None
        if name in self.module.definitions:
            return self.module.name, name
        return self.module.names.get(name)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.bound.add(node.id)
            return
        key = self._resolve(node.id)
        if key is not None:
            self._use(node, key)
        elif node.id in self.module.outside and not any(node.id in scope for scope in self._scopes):
            self.outside.add(self.module.outside[node.id])

    def visit_Attribute(self, node):
        base = node.value
        if isinstance(base, ast.Name) and base.id in self.module.modules:
            if not any(base.id in scope for scope in self._scopes):
                self._use(node, (self.module.modules[base.id], node.attr))
                return
        self.generic_visit(node)

    def _use(self, node, key: Key) -> None:
        start, end = (
            self.module.place(node.lineno, node.col_offset),
            self.module.place(node.end_lineno, node.end_col_offset),
        )
        self.uses.append(_Use(start, end, self.gathering.settle(key), not self._scopes))

    def visit_ClassDef(self, node):
        self._decorators(node)
        for base in [*node.bases, *(k.value for k in node.keywords)]:
            self.visit(base)
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name in self.unused:
                self.dropped.append(self.module.span(child))
            else:
                self.visit(child)

    def visit_FunctionDef(self, node):
        self._decorators(node)
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        for default in [*arguments.defaults, *(d for d in arguments.kw_defaults if d is not None)]:
            self.visit(default)
        for annotation in [*(a.annotation for a in every), node.returns]:
            self._annotation(annotation)
        names = {a.arg for a in every} | {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        self.bound |= names
        self._scopes.append(names)
        for child in node.body:
            self.visit(child)
        self._scopes.pop()

    def visit_Lambda(self, node):
        names = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        self.bound |= names
        self._scopes.append(names)
        self.visit(node.body)
        self._scopes.pop()

    def visit_AnnAssign(self, node):
        self._annotation(node.annotation)
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_ImportFrom(self, node):
        if node.level:
            raise ValueError(
                f"{self.module.name}: an import of the package inside a definition cannot be gathered"
            )

    def _decorators(self, node):
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if isinstance(called, ast.Name) and called.id == "register":
                self.dropped.append(self.module.span(decorator))
            else:
                self.visit(decorator)

    def _annotation(self, node) -> None:
        """Annotations are never evaluated: of their names only those of other packages come along."""
        for name in ast.walk(node) if node is not None else ():
            if isinstance(name, ast.Name) and name.id in self.module.outside:
                self.outside.add(self.module.outside[name.id])


class _Gathering:
    """All definitions that the roots reach."""

    def __init__(self, roots: list[Key], given: dict[Key, str]):
        self.given = given
        """Definitions whose text is written here."""
        self.in_place_of = {
            (f"{PACKAGE}.{module}", name): (_PLAIN, plain) for (module, name), plain in _IN_PLACE_OF.items()
        }
        self._modules: dict[str, _Module] = {}
        self.read: dict[Key, list[tuple[_Module, ast.stmt, _Reader]]] = {}
        waiting = list(roots)
        while waiting:
            key = waiting.pop()
            if key in self.read or key in given:
                continue
            self.read[key] = self._read(key)
            waiting += [use.key for *_, reader in self.read[key] for use in reader.uses]

    def module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module.read(name)
        return self._modules[name]

    def settle(self, key: Key) -> Key:
        """Where a definition is: through modules that hand on what others define, and through what takes its place."""
        while True:
            if key in self.given:
                return key
            if key in self.in_place_of:
                return self.in_place_of[key]
            module = self.module(key[0])
            if key[1] in module.definitions:
                return key
            if key[1] not in module.names:
                raise ValueError(f"{key[0]} has no definition of {key[1]} that could be gathered")
            key = module.names[key[1]]

    def _read(self, key: Key):
        module = self.module(key[0])
        return [(module, node, _Reader(self, module, node)) for node in module.definitions[key[1]]]

    def final_names(self) -> dict[Key, str]:
        """A name for each definition that no other has and that nothing binds inside of a definition."""
        keys = [*self.read, *self.given]
        counts: dict[str, int] = defaultdict(int)
        for _, name in keys:
            counts[name] += 1
        taken = set(dir(builtins)) | {
            name for found in self.read.values() for *_, r in found for name in r.bound
        }
        taken -= {name for _, name in keys if counts[name] == 1 and self._is_constant(name)}
        outside = {name for m in self._modules.values() for name in m.outside}
        names = {}
        for module, name in keys:
            clashes = counts[name] > 1 or name in taken or name in outside
            names[module, name] = f"{module.rpartition('.')[2]}_{name}".lstrip("_") if clashes else name
        assert len(set(names.values())) == len(names)
        return names

    def _is_constant(self, name: str) -> bool:
        """A module's own assignment binds its name; that is no clash."""
        return name.isupper() or name[:1].isupper()

    def text(self, key: Key, names: dict[Key, str]) -> str:
        return "\n\n".join(self._text(key, *found, names) for found in self.read[key])

    def _text(self, key, module: _Module, node, reader: _Reader, names) -> str:
        start, end = module.span(node)
        edits = [(use.start, use.end, names[use.key].encode()) for use in reader.uses]
        edits += [(a, b, None) for a, b in reader.dropped]
        if (final := names[key]) != key[1]:
            at = module.source.index(key[1].encode(), module.place(node.lineno, node.col_offset))
            edits.append((at, at + len(key[1].encode()), final.encode()))
        within = [(a, b) for a, b in reader.dropped]
        pieces, last = [], start
        for a, b, new in sorted(edits, key=lambda edit: edit[0]):
            if a < last or (new is not None and any(x <= a < y for x, y in within)):
                continue
            pieces.append(module.source[last:a])
            pieces.append(new or b"")
            last = b
        pieces.append(module.source[last:end])
        return _tidy(b"".join(pieces).decode())

    def order(self) -> list[Key]:
        """Every definition behind those that must be there when it is made; else as in the sources."""
        done: dict[Key, None] = {}

        def put(key: Key) -> None:
            if key in done or key in self.given:
                return
            for *_, reader in self.read[key]:
                for use in reader.uses:
                    if use.at_once and use.key != key:
                        put(use.key)
            done[key] = None

        rank = {name: i for i, name in enumerate(self._by_depth())}
        for key in sorted(self.read, key=lambda k: (rank[k[0]], self.read[k][0][1].lineno)):
            put(key)
        return list(done)

    def _by_depth(self) -> list[str]:
        """Modules, those that are used before those that use them."""
        last = [_PLAIN, f"{PACKAGE}.model", f"{_HF}.configuration", f"{_HF}.modeling"]
        return [*(m for m in sorted(self._modules) if m not in last), *last]


def _tidy(text: str) -> str:
    """Without the blank lines and lone ``@`` that a removal leaves."""
    lines, blank = [], 0
    for line in text.splitlines():
        if line.strip() == "@":
            continue
        blank = blank + 1 if not line.strip() else 0
        if blank <= 1:
            lines.append(line.rstrip())
    return "\n".join(lines).strip("\n")


def model_code(config: GPTConfig) -> str:
    """The file for a model with the connection ``config.residual``: every model of that connection can use it."""
    from .. import __version__

    entry = registry.find(config.residual)
    factory = (entry.factory.__module__, entry.factory.__name__)
    options = (entry.options.__module__, entry.options.__name__)
    roots, made = [*ROOTS, factory], "None"
    if entry.options is not registry.NoOptions:
        roots.append(options)
        made = "{options}(**config.residual_options)"
    build = (f"{PACKAGE}.residuals.registry", "build_residual")
    fields = (f"{PACKAGE}.exchange.fields", "FIELDS")
    gathering = _Gathering(roots, {build: "", fields: ""})
    names = gathering.final_names()
    made = made.format(options=names.get(options))
    built = BUILD.format(residual=config.residual, factory=names[factory], options=made, name=names[build])
    listed = "\n".join(f'    "{name}",' for name in FIELDS)
    about = ast.get_docstring(ast.parse(_source(factory[0]).read_text(encoding="utf-8")))
    imports = {statement for found in gathering.read.values() for *_, r in found for statement in r.outside}
    texts = [gathering.text(key, names) for key in gathering.order()]
    parts = [
        HEAD.format(residual=config.residual, version=__version__, about=about),
        "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line))),
        f"{names[fields]} = (\n{listed}\n)",
        *texts,
        built,
    ]
    code = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
    compile(code, "modeling_depthmix.py", "exec")
    return code


HEAD = '''r"""A language model with the residual connection ``{residual}``, for transformers.

Gathered from the sources of depthmix {version} by ``depthmix export --to hf --standalone``; do not edit. Apache-2.0.

{about}
"""

from __future__ import annotations
'''

BUILD = '''def {name}(config):
    """The residual connection of this file."""
    if config.residual != "{residual}":
        raise ValueError(
            f"this file has the code of the residual connection {residual}, not of {{config.residual!r}}; export that "
            f"model with depthmix"
        )
    return {factory}(config, {options})
'''
