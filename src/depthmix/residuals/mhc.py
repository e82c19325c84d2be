r"""Manifold-constrained Hyper-Connections, with Sinkhorn (``mhc``) or permutations (``mhc-lite``).

``mhc``: Xie et al. 2025, arXiv 2512.24880. ``mhc-lite``: Yang and Gao 2026, arXiv 2601.05732. Around each
sublayer (Eq. 3), over n streams :math:`H \in R^{n \times D}` that begin as copies of the embedding:

.. math:: H \leftarrow H_{res} H + H_{post}^\top F(H_{pre} H)

All three come from the streams in front of the sublayer, :math:`x' = \mathrm{rms}(\mathrm{vec}(H))` over n D
numbers (Eq. 7, 8):

.. math::
    z &= \alpha\,(x' \phi) + b, \qquad \alpha \text{ one each for pre, post and res} \\
    H_{pre} &= \sigma(z_{pre}), \qquad H_{post} = 2 \sigma(z_{post}), \qquad
    H_{res} = \text{Sinkhorn}(z_{res}) \;\text{ or }\; \textstyle\sum_r \mathrm{softmax}(z_{res})_r P_r

with the n! permutation matrices :math:`P_r` in mHC-lite (n at most 6: 720 of them).
:math:`\phi` is [nD, n^2 + 2n] or [nD, n! + 2n] and starts at zero, :math:`\alpha` at .01; the norm's weight is
contained in :math:`\phi`. Behind the last sublayer the streams are summed.

**Orientation.** :math:`H_{res}` stands in front of the streams, so the forward gain is its row sums, and each
of the 20 Sinkhorn iterations divides rows last (Eq. 9 is :math:`\mathcal T_r(\mathcal T_c(M))`): the forward
gain is 1 to rounding after any number of iterations, over any depth, and only column sums (the backward
gain) are approximate, as in the paper's Fig. 7. DeepSeek-V4 in transformers holds the transpose and divides
its columns last: the same. The hyper-connections package (0.4.11) and the mHC-lite authors' copy of it also divide
rows last, but apply the transpose, so that there it is the forward gain that is approximate.

**The start.** The paper leaves :math:`b` open. Here, as in the code of mHC-lite: with stream
j = k mod n for sublayer k = 0 .. L - 1, pre and post logits are +1 for stream j and -1 for the others; residual
logits are 0 on the diagonal and -8 off it (identity and others, in mHC-lite). So at first, for every token,
and n = 4: :math:`H_{pre}` is .731 for stream j and .269 for the others; :math:`H_{post}` 1.462 and .538;
the diagonal of :math:`H_{res}` is .9990, the identity's weight in mHC-lite .9923. This is *not* PreNorm, for any
n > 1. What holds exactly: the streams' sum obeys :math:`\sum_i H'_i = \sum_i H_i + c\,y` with
c = 2 (1 + (n - 2) sigmoid(-1)), so the trunk's output is :math:`n x + c \sum_l y_l`: PreNorm's with every output
weighted by c / n, which is 1 at n = 2 and .769 at n = 4. Each input is a positive mixture of the streams whose
weights sum to c / 2. The streams part at the first write, which puts more into stream j.

Saturated logits have small gradients. With -8 a weight is 3e-4, times what the streams differ by: in a small model
the first gradients of :math:`z_{res}` are 1e-9 to 1e-10, below AdamW's usual epsilon of 1e-8 (the mHC report trains
with 1e-20), and pass it within tens of steps, as the streams grow apart. ``off_diagonal`` and ``off_identity``
are there to start nearer.

**Where others differ.** Pre and post logits: mHC-lite's authors draw j at random (their training code passes
no layer index); transformers starts :math:`b` at zero. Residual logits: the hyper-connections package puts in the
identity itself, so its diagonal starts at .475. :math:`\phi`: Megatron draws it, Liger too, with :math:`\alpha = 1`.
Norm: the package takes one per stream, and its :math:`\phi` acts on single streams. The end: mean of the streams in
Megatron and GLM, a gated sum in DeepSeek-V4, the sum of *normed* streams in the mHC-lite code; here the
sum as in HC, or ``merge=mean``. transformers adds 1e-6 to H_pre and in every Sinkhorn division.

With n = 1 every doubly stochastic matrix is 1: :math:`z_{res}` does not exist, only :math:`H_{pre}` and
:math:`H_{post}` are left.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..ops import hyper
from .hyper import Coefficients, HyperResidual, Merge
from .registry import register

if TYPE_CHECKING:
    from ..config import GPTConfig

LARGEST_LITE = 6


class ManifoldCoefficients(Coefficients):
    """phi, b and alpha of one sublayer, as :class:`depthmix.ops.hyper.Manifold` says."""

    family: hyper.Manifold
    decayed = ("projection",)

    def __init__(self, d_model, n_streams, sublayer, iterations, alpha_init, residual_logit, eps):
        super().__init__()
        self.n_streams, self.sublayer = n_streams, sublayer
        self.alpha_init, self.residual_logit = alpha_init, residual_logit
        self.family = hyper.Manifold(n_streams, iterations, eps)
        size = 2 * n_streams + self.family.residual_size
        self.projection = nn.Parameter(torch.empty(n_streams * d_model, size))
        self.bias = nn.Parameter(torch.empty(size))
        self.alpha = nn.Parameter(torch.empty(2 if n_streams == 1 else 3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = self.n_streams
        self.projection.zero_()
        self.alpha.fill_(self.alpha_init)
        pre, post, residual = self.bias.split([n, n, self.family.residual_size])
        for gate in (pre, post):
            gate.fill_(-1.0)
            gate[self.sublayer % n] = 1.0
        residual.fill_(self.residual_logit)
        if self.family.iterations is None:
            residual[:1] = 0.0  # the identity is the first permutation
        else:
            residual[:: n + 1] = 0.0

    @torch.no_grad()
    def start_as_prenorm(self) -> None:
        """H_post = 1 for every stream, and H_pre sums to 1: still .731 for stream j, the rest in equal parts, so that
        the streams part. H_res passes equal streams on unchanged, whatever it is."""
        n = self.n_streams
        if n == 1:
            raise UserError(
                "with n_streams = 1 the read is sigmoid(z) of the one stream, which no z makes 1: no PreNorm can be "
                "continued. Use n_streams of at least 2"
            )
        self.reset_parameters()
        pre, post = self.bias[:n], self.bias[n : 2 * n]
        post.zero_()
        own = 1 / (1 + math.exp(-1))
        for stream in range(n):
            share = own if stream == self.sublayer % n else (1 - own) / (n - 1)
            pre[stream] = math.log(share / (1 - share))

    def values(self):
        return self.projection, self.bias, self.alpha


def _check_alpha(name: str, alpha_init: float) -> None:
    if alpha_init == 0:
        raise UserError(
            f"residual {name}: alpha_init must not be 0, got 0: phi and alpha would both stay zero for ever; "
            "the papers use .01"
        )


@dataclass(frozen=True)
class ManifoldOptions:
    """Options of ``mhc``."""

    iterations: int = 20
    """Sinkhorn iterations; rows sum to 1 after any number, columns better with more."""
    alpha_init: float = 0.01
    """Initial value of the three learned factors of the dynamic part."""
    off_diagonal: float = -8.0
    """Initial residual logits off the diagonal, where the diagonal's are 0."""
    merge: Merge = "sum"
    """How the streams become the trunk's output: sum or mean."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"residual mhc: iterations must be at least 1, got {self.iterations}")
        _check_alpha("mhc", self.alpha_init)


@dataclass(frozen=True)
class LiteOptions:
    """Options of ``mhc-lite``."""

    alpha_init: float = 0.01
    """Initial value of the three learned factors of the dynamic part."""
    off_identity: float = -8.0
    """Initial logits of all permutations but the identity, whose logit is 0."""
    merge: Merge = "sum"
    """How the streams become the trunk's output: sum or mean."""

    def __post_init__(self) -> None:
        _check_alpha("mhc-lite", self.alpha_init)


@register(
    "mhc",
    "n streams, mixed by doubly stochastic matrices made by Sinkhorn iterations",
    options=ManifoldOptions,
    fields=("n_streams",),
)
class ManifoldHyperConnections(HyperResidual):
    def coefficients(self, sublayer):
        return ManifoldCoefficients(
            self.d_model, self.n_streams, sublayer, self.options.iterations, self.options.alpha_init,
            self.options.off_diagonal, self.eps,
        )  # fmt: skip


@register(
    "mhc-lite",
    "n streams, mixed by doubly stochastic matrices that are means of permutations",
    options=LiteOptions,
    fields=("n_streams",),
)
class ManifoldHyperConnectionsLite(HyperResidual):
    def __init__(self, config: "GPTConfig", options: Any):
        if config.n_streams > LARGEST_LITE:
            raise UserError(
                f"mhc-lite weighs all n! permutations of n streams, so n_streams must be at most {LARGEST_LITE} "
                f"(720 of them), got {config.n_streams}; use fewer streams, or mhc"
            )
        super().__init__(config, options)

    def coefficients(self, sublayer):
        return ManifoldCoefficients(
            self.d_model, self.n_streams, sublayer, None, self.options.alpha_init, self.options.off_identity,
            self.eps,
        )  # fmt: skip
