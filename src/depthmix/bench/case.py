"""What a case is, and the registry.

A case is declared in one place: its inputs, the function under test (depthmix's public one), the reference in plain
torch operations that runs in any precision, the floor, and which peers compute the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError, suggest
from .floor import Floors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Tensors = dict[str, Tensor]
FILL = 2**26
"""Elements of a case's streams or sources on a GPU where no number of tokens is given: beyond its cache."""
CPU_TOKENS = 4096


@dataclass(frozen=True)
class Size:
    """What a problem is built for."""

    device: torch.device
    dtype: torch.dtype
    axes: dict[str, int]
    """``n`` and ``width``, as far as the case has these axes."""
    tokens: int

    @property
    def n(self) -> int:
        return self.axes["n"]

    @property
    def width(self) -> int:
        return self.axes["width"]

    def draw(self, *shape: int, scale: float = 1.0, seed: int) -> Tensor:
        """Normal numbers, the same on every device, in the case's dtype."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(*shape, generator=generator) * scale).to(self.dtype).to(self.device)

    def per_token(self, *shape: int, scale: float = 1.0, seed: int) -> Tensor:
        """:meth:`draw` of ``[tokens, *shape]``, on the device itself: these are large."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.empty(self.tokens, *shape, dtype=self.dtype, device=self.device)
        return drawn.normal_(generator=generator).mul_(scale)


@dataclass
class Peer:
    """Another package's way to the same result."""

    name: str
    package: str
    prepare: Callable[[], "Adapted"]
    """Imports the package; called only where it is installed."""
    device: str | None = None
    """The one kind of device it runs on; ``None`` for any."""
    refuses: str | None = None
    """Why it cannot take this problem."""


@dataclass
class Adapted:
    """Inputs as an implementation wants them, and the way back to the case's names."""

    leaves: Tensors
    run: Callable[[Tensors], Tensors]
    """From the leaves to the outputs, named and shaped as the case's."""
    gradients: Callable[[Tensors], Tensors] = lambda gradients: gradients
    """From the leaves' gradients to those of the case's inputs, or of some of them."""


@dataclass
class Problem:
    """One case at one size."""

    inputs: Tensors
    """Leaves; all of them get a gradient."""
    shared: frozenset[str]
    """Inputs without a token dimension (parameters). All others have it first."""
    reference: Callable[[Tensors], Tensors]
    function: Callable[[Tensors], Tensors]
    floor: Floors
    width: int
    """What D is in the floor."""
    peers: list[Peer] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    name: str
    summary: str
    variants: dict[str, tuple[str, ...]]
    """Variant -> its axes, of ``n`` and ``width``."""
    build: Callable[[Size, str], Problem]
    vectors: Callable[[str, int | None], int]
    """Vectors of D elements that a token holds, for the number of tokens."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    least_n: int = 1


CASES: dict[str, Case] = {}


def case(name: str, summary: str, variants: dict[str, tuple[str, ...]], **rest):
    """Register a function ``(size, variant) -> Problem``; ``rest`` are the further fields of :class:`Case`."""

    def add(build):
        CASES[name] = Case(name, summary, variants, build, **rest)
        return build

    return add


def find(word: str, others: dict) -> tuple[str, tuple[str, ...]]:
    """``NAME`` or ``NAME:VARIANT`` -> ``(name, variants)``; ``others`` are cases of another kind, with their
    variants. ``UserError`` names the nearest."""
    name, _, variant = word.partition(":")
    known = {key: tuple(value.variants) for key, value in CASES.items()} | others
    if name not in known:
        raise UserError(suggest(name, known, "case") + "; depthmix bench --list describes them")
    if not variant:
        return name, known[name]
    if variant not in known[name]:
        raise UserError(suggest(variant, known[name], f"variant of {name}"))
    return name, (variant,)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
