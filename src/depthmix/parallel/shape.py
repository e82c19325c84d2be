r"""The dimensions of a model that is only priced, never built: dense, or a mixture of experts.

Numbers of parameters, D features, W the width of all heads, F hidden features of an MLP (of one expert), E experts:

.. math:: P = V D + D + \sum_{blocks} (4 D W + 2 E D F + [E > 1] E D + 2 D) + \text{connection}

with the embedding tied to the head. Of E experts a token uses ``active``. depthmix trains dense models with F = 4D;
everything else is for the cost model alone (:mod:`depthmix.parallel.cost`).
"""

from dataclasses import dataclass

from ..config import GPTConfig
from ..errors import UserError, suggest


@dataclass(frozen=True)
class Shape:
    """Dimensions of a trunk with its embedding. Raises ``UserError`` for what cannot be."""

    layers: int
    """Blocks; each is an attention and an MLP."""
    width: int
    """D."""
    heads: int
    ffn: int
    """F: hidden features of the MLP, or of one expert."""
    vocab: int
    experts: int = 1
    active: int = 1
    """Experts that a token goes through."""

    def __post_init__(self):
        for name in ("layers", "width", "heads", "ffn", "vocab", "experts", "active"):
            if getattr(self, name) < 1:
                raise UserError(f"shape: {name} must be at least 1, got {getattr(self, name)}")
        if self.active > self.experts:
            raise UserError(
                f"shape: a token cannot use active = {self.active} of experts = {self.experts}; lower active"
            )
        if self.width % self.heads:
            raise UserError(
                f"shape: heads = {self.heads} must divide width = {self.width}; choose other heads"
            )

    @classmethod
    def of(cls, model: GPTConfig) -> "Shape":
        """The shape of a model that depthmix builds; its heads may be wider than D together."""
        return cls(
            model.n_layer,
            model.d_model,
            model.n_head if model.d_model % model.n_head == 0 else 1,
            4 * model.d_model,
            model.vocab_size,
        )

    @property
    def block_matrices(self) -> int:
        """Numbers in the matrices of a block, experts aside."""
        dense = 2 * self.width * self.ffn if self.experts == 1 else self.experts * self.width  # or the router
        return 4 * self.width**2 + dense

    @property
    def block_experts(self) -> int:
        """Numbers in the experts of a block; 0 for a dense model."""
        return 2 * self.experts * self.width * self.ffn if self.experts > 1 else 0

    @property
    def parameters(self) -> int:
        """Total, without the connection's."""
        each = self.block_matrices + self.block_experts + 2 * self.width
        return self.vocab * self.width + self.width + self.layers * each

    @property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        idle = self.block_experts * (self.experts - self.active) // self.experts
        return self.parameters - self.layers * idle

    def model(self, residual: str, seq_len: int, **fields) -> GPTConfig:
        """What the connection sees of this model: depth, width, heads."""
        return GPTConfig(
            self.vocab, self.layers, self.width, self.heads, seq_len, residual=residual, **fields
        )


SHAPES = {
    # 6.65 B parameters.
    "7B": Shape(layers=32, width=4096, heads=32, ffn=16384, vocab=50304),
    # 71.3 B parameters.
    "70B": Shape(layers=88, width=8192, heads=64, ffn=32768, vocab=50304),
    # 106.5 B parameters, 16.3 B of them active: 64 experts, 8 for a token.
    "100B-moe": Shape(layers=48, width=4096, heads=32, ffn=4096, vocab=50304, experts=64, active=8),
}


def shape_of(name: str) -> Shape:
    """The preset of that name, those of ``depthmix.presets`` included."""
    from ..presets import PRESETS

    if name in SHAPES:
        return SHAPES[name]
    if name in PRESETS:
        return Shape.of(PRESETS[name].model)
    raise UserError(suggest(name, [*SHAPES, *PRESETS], "preset"))


def solve(parameters: float, layers: int, vocab: int = 50304) -> Shape:
    """A dense shape with about that many parameters and F = 4D.

    D is the multiple of 1024 that comes nearest if that is within 2 % of ``parameters``, else of 512, 256, and so on to
    32: coarse multiples leave tensor parallelism more choice. Heads have 128 features where D allows it, else 64 or 32.
    """
    if layers < 1:
        raise UserError(f"--layers must be at least 1, got {layers}")

    def of(width: int) -> Shape:
        size = next((s for s in (128, 64, 32) if width % s == 0), width)
        return Shape(layers, width, width // size, 4 * width, vocab)

    # 12 layers D^2 + (vocab + 1 + 2 layers) D = parameters
    linear = vocab + 1 + 2 * layers
    exact = ((linear**2 + 48 * layers * parameters) ** 0.5 - linear) / (24 * layers)
    for step in (1024, 512, 256, 128, 64, 32):
        width = max(step, round(exact / step) * step)
        found = of(width)
        if abs(found.parameters / parameters - 1) <= 0.02:
            return found
    raise UserError(
        f"no width in multiples of 32 gives {layers} blocks and a vocabulary of {vocab:,} within 2 % of "
        f"{parameters:,.0f} parameters (D = {exact:.0f} would); change --params or --layers"
    )
