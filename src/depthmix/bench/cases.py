"""The operations that are timed: inputs, function, reference, floor and peers of each, in one place.

References are plain torch operations in the compute dtype of their inputs, rounded where the operation says it
rounds; in float64 they are the truth, in the case's own dtype they are what a candidate's error is measured by.
"""

import torch
from torch import Tensor

from .. import functional
from ..config import GPTConfig
from ..ops import hyper
from ..ops.channel_gate import admit, channel_gate, gated_update
from ..ops.reference import attention_pool, compute_dtype, multi_gate_residual, rms
from ..ops.sinkhorn import sinkhorn, sinkhorn_reference
from ..residuals import build_residual
from . import floor, peers
from .case import Problem, Size, Tensors, case, leaf

EPS = 1e-6
KEEP_BIAS = 2.8
"""Of the competitive gate: what Eq. 14 gives at 12 blocks and n = 4."""


def _named(prefix: str, x: Tensors) -> list[Tensor]:
    """``prefix.0, prefix.1, ...`` in their order."""
    return [x[f"{prefix}.{i}"] for i in range(sum(key.startswith(prefix + ".") for key in x))]


def _norm(h: Tensor, weight: Tensor) -> Tensor:
    dtype = compute_dtype(h.dtype)
    return (rms(h.to(dtype), EPS) * weight.to(dtype)).to(h.dtype)


def _problem(inputs: Tensors, shared: set[str], **rest) -> Problem:
    # A parameter that a module owns stays that parameter.
    leaves = {k: x if isinstance(x, torch.nn.Parameter) else leaf(x) for k, x in inputs.items()}
    return Problem(leaves, frozenset(shared), **rest)


# --- Multi-Gate Residuals ---------------------------------------------------------------------


def _gate_parameters(size: Size, gate: str, seed: int) -> Tensors:
    bias = size.draw(size.n + (gate == "competitive"), scale=0.3, seed=seed)
    if gate == "competitive":
        bias[0] += KEEP_BIAS
    else:
        bias -= KEEP_BIAS
    parameters = {"gate_weight": size.draw(size.width, seed=seed + 1), "gate_bias": bias}
    if size.n > 1:  # a pool over one stream has no weight
        parameters["pool_weight"] = size.draw(size.width, seed=seed + 2)
    return parameters


@case(
    "mgr-step",
    "one step of Multi-Gate Residuals: gate, lerp, pool; +norm with the next RMSNorm",
    {
        "competitive": ("n", "width"),
        "independent": ("n", "width"),
        "competitive+norm": ("n", "width"),
    },
    vectors=lambda variant, n: n,
)
def _mgr_step(size: Size, variant: str) -> Problem:
    gate, _, norm = variant.partition("+")
    parameters = _gate_parameters(size, gate, seed=3)
    if norm:
        parameters["norm_weight"] = 1 + size.draw(size.width, scale=0.1, seed=7)
    inputs = {
        "layer_output": size.per_token(size.width, seed=1),
        "streams": size.per_token(size.n, size.width, seed=2),
        **parameters,
    }

    def reference(x: Tensors) -> Tensors:
        h, streams = multi_gate_residual(
            x["layer_output"], x["streams"], x["gate_weight"], x["gate_bias"], x.get("pool_weight"), gate,
            None, size.width**-0.5, EPS,
        )  # fmt: skip
        return {"h": _norm(h, x["norm_weight"]) if norm else h, "new_streams": streams}

    def function(x: Tensors) -> Tensors:
        h, streams = functional.multi_gate_residual(
            x["layer_output"], x["streams"], x["gate_weight"], x["gate_bias"], x.get("pool_weight"),
            gate=gate, eps=EPS, norm_weight=x.get("norm_weight"), norm_eps=EPS,
        )  # fmt: skip
        return {"h": h, "new_streams": streams}

    return _problem(
        inputs, set(parameters), reference=reference, function=function, floor=floor.step(size.n),
        width=size.width,
    )  # fmt: skip


WINDOW = 8
"""Steps of a replay window, GPTConfig's default."""


@case(
    "mgr-step-window",
    f"a replay window: {WINDOW} steps of Multi-Gate Residuals that keep one anchor",
    {"competitive": ("n", "width"), "independent": ("n", "width")},
    vectors=lambda variant, n: n + WINDOW,
)
def _mgr_window(size: Size, gate: str) -> Problem:
    config = GPTConfig(
        16, size.n + WINDOW, size.width, 1, 8, residual=f"mgr-{gate}", n_streams=size.n,
        stream_memory="replay", replay_window=WINDOW, norm_eps=EPS, head_size=2,
    )  # fmt: skip
    connection = build_residual(config)
    sites = [connection.site(size.n + j) for j in range(WINDOW)]
    inputs = {"streams": size.per_token(size.n, size.width, seed=1)}
    shared = set()
    for j, site in enumerate(sites):
        inputs[f"layer_output.{j}"] = size.per_token(size.width, seed=100 + j)
        for name, value in _gate_parameters(size, gate, seed=10 * (j + 1)).items():
            parameter = torch.nn.Parameter(value)
            setattr(site, name, parameter)
            inputs[f"{name}.{j}"] = parameter
            shared.add(f"{name}.{j}")

    def reference(x: Tensors) -> Tensors:
        streams, outputs = x["streams"], {}
        for j in range(WINDOW):
            outputs[f"h.{j}"], streams = multi_gate_residual(
                x[f"layer_output.{j}"], streams, x[f"gate_weight.{j}"], x[f"gate_bias.{j}"],
                x.get(f"pool_weight.{j}"), gate, None, size.width**-0.5, EPS,
            )  # fmt: skip
        return {**outputs, "new_streams": streams}

    def function(x: Tensors) -> Tensors:
        state, outputs = (x["streams"],), {}
        for j, site in enumerate(sites):
            outputs[f"h.{j}"], state = site(x[f"layer_output.{j}"], state)
        return {**outputs, "new_streams": state[0]}

    return _problem(
        inputs, shared, reference=reference, function=function, floor=floor.window(size.n, WINDOW),
        width=size.width,
    )  # fmt: skip


# --- pools --------------------------------------------------------------------------------------

SOURCES = {"sources-8": 8, "sources-25": 25, "sources-49": 49}
"""Block Attention Residuals with 8 blocks; the last read of presets S and M."""


@case(
    "pool",
    "a read: Attention Residuals over separate sources; MGR over its n streams",
    {**dict.fromkeys(SOURCES, ("width",)), "streams": ("n", "width")},
    vectors=lambda variant, n: SOURCES.get(variant, n),
)
def _pool(size: Size, variant: str) -> Problem:
    weight = size.draw(size.width, scale=size.width**-0.5, seed=1)
    if variant == "streams":
        inputs = {"streams": size.per_token(size.n, size.width, seed=2), "weight": weight}
        return _problem(
            inputs,
            {"weight"},
            reference=lambda x: {"h": attention_pool(x["streams"], x["weight"], size.width**-0.5, EPS)},
            function=lambda x: {"h": functional.attention_pool(x["streams"], x["weight"], eps=EPS)},
            floor=floor.pool(size.n),
            width=size.width,
        )
    count = SOURCES[variant]
    inputs = {f"source.{i}": size.per_token(size.width, scale=1 + i % 4, seed=10 + i) for i in range(count)}
    inputs["weight"] = weight

    def reference(x: Tensors) -> Tensors:
        return {"h": attention_pool(torch.stack(_named("source", x), -2), x["weight"], 1.0, EPS)}

    def function(x: Tensors) -> Tensors:
        return {"h": functional.source_pool(_named("source", x), x["weight"], scale=1.0, eps=EPS)}

    problem = _problem(
        inputs, {"weight"}, reference=reference, function=function, floor=floor.pool(count), width=size.width
    )
    problem.peers = peers.attnres(size, problem.inputs, count, EPS)
    return problem


BLOCK_SOURCES, BLOCK_READS = 8, 8


@case(
    "attnres-block-two-phase",
    f"the {BLOCK_READS} reads of a block of Attention Residuals, {BLOCK_SOURCES} finished sources before it",
    {"plain": ("width",)},
    vectors=lambda variant, n: BLOCK_SOURCES + BLOCK_READS,
)
def _block(size: Size, variant: str) -> Problem:
    # The embedding and seven finished blocks; then this one.
    config = GPTConfig(
        16, BLOCK_SOURCES * BLOCK_READS, size.width, 1, 8, norm_eps=EPS, head_size=2,
        residual=f"attnres-block:block_size={BLOCK_READS}:key_norm=plain",
    )  # fmt: skip
    connection = build_residual(config)
    before = (BLOCK_SOURCES - 1) * BLOCK_READS
    sites = [connection.site(before + 1 + j) for j in range(BLOCK_READS)]
    inputs = {f"source.{i}": size.per_token(size.width, seed=10 + i) for i in range(BLOCK_SOURCES)}
    for j, site in enumerate(sites):
        inputs[f"layer_output.{j}"] = size.per_token(size.width, seed=100 + j)
        site.query = torch.nn.Parameter(size.draw(size.width, scale=size.width**-0.5, seed=200 + j))
        inputs[f"query.{j}"] = site.query

    def reference(x: Tensors) -> Tensors:
        sources, running, outputs = _named("source", x), x["layer_output.0"], {}
        for j in range(BLOCK_READS):
            running = running + x[f"layer_output.{j}"] if j else running
            stacked = torch.stack([*sources, running], -2)
            outputs[f"h.{j}"] = attention_pool(stacked, x[f"query.{j}"], 1.0, EPS)
        return {**outputs, "running_sum": running}

    def function(x: Tensors) -> Tensors:
        state, outputs = tuple(_named("source", x)), {}
        for j, site in enumerate(sites):
            outputs[f"h.{j}"], state = site(x[f"layer_output.{j}"], state)
        return {**outputs, "running_sum": state[BLOCK_SOURCES]}

    problem = _problem(
        inputs, {f"query.{j}" for j in range(BLOCK_READS)}, reference=reference, function=function,
        floor=floor.block(BLOCK_SOURCES, BLOCK_READS), width=size.width,
    )  # fmt: skip
    problem.peers = peers.attnres_block(size, problem.inputs, BLOCK_SOURCES, BLOCK_READS, EPS)
    return problem


# --- other connections --------------------------------------------------------------------------


@case(
    "channel-gate",
    "gate per channel and blend: review (D x 2D matrix, additive), highway (D x D, convex)",
    {"review": ("width",), "highway": ("width",)},
    vectors=lambda variant, n: 2,
)
def _channel_gate(size: Size, variant: str) -> Problem:
    columns = size.width * (2 if variant == "review" else 1)
    convex = variant == "highway"
    inputs = {
        "x": size.per_token(size.width, seed=1),
        "update": size.per_token(size.width, seed=2),
        "weight": size.draw(size.width, columns, scale=columns**-0.5, seed=3),
        "bias": size.draw(size.width, seed=4),
    }

    def reference(x: Tensors) -> Tensors:
        gate = channel_gate(x["x"], x["update"], x["weight"], x["bias"], True, EPS)
        new = admit(x["x"].to(gate.dtype), x["update"].to(gate.dtype), gate, convex)
        return {"x": new.to(x["x"].dtype)}

    def function(x: Tensors) -> Tensors:
        new = gated_update(x["x"], x["update"], x["weight"], x["bias"], convex=convex, eps=EPS)
        return {"x": new}

    return _problem(
        inputs, {"weight", "bias"}, reference=reference, function=function, floor=floor.channel_gate(),
        width=size.width,
    )  # fmt: skip


SINKHORN_ITERATIONS = 20


@case(
    "sinkhorn",
    f"{SINKHORN_ITERATIONS} iterations on an n x n matrix per token, forward and through all of them",
    {"mhc": ("n",)},
    vectors=lambda variant, n: n * n,
    dtypes=("fp32",),
    least_n=2,
)
def _sinkhorn(size: Size, variant: str) -> Problem:
    return _problem(
        {"logits": size.per_token(size.n, size.n, scale=2.0, seed=1)},
        set(),
        reference=lambda x: {"matrix": sinkhorn_reference(x["logits"], SINKHORN_ITERATIONS)},
        function=lambda x: {"matrix": sinkhorn(x["logits"], SINKHORN_ITERATIONS)},
        floor=floor.sinkhorn(),
        width=size.n * size.n,
    )


SUBLAYERS = 4
"""Of the chain of Hyper-Connections: read, three steps, write."""


def manifold_reference(streams, projection, bias, alpha):
    """The coefficients ``[..., n + 2, n]`` of :class:`depthmix.ops.hyper.Manifold`, differentiable as it stands."""
    dtype, n = compute_dtype(streams.dtype), streams.shape[-2]
    normed = rms(streams.to(dtype).flatten(-2), EPS)
    factors = torch.cat([a.expand(k) for a, k in zip(alpha.to(dtype), (n, n, n * n), strict=True)])
    z = factors * (normed @ projection.to(dtype)) + bias.to(dtype)
    pre, post = torch.sigmoid(z[..., :n]), 2 * torch.sigmoid(z[..., n : 2 * n])
    residual = sinkhorn_reference(z[..., 2 * n :].unflatten(-1, (n, n)), SINKHORN_ITERATIONS)
    return torch.cat([residual.mT, post.unsqueeze(-2), pre.unsqueeze(-2)], -2)


def _read(streams: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * streams.to(weights.dtype)).sum(-2).to(streams.dtype)


def _hyper_parameters(size: Size, variant: str, k: int) -> Tensors:
    """Of sublayer ``k``, near their initial values but with dynamic parts that count."""
    n, width, seed = size.n, size.width, 1000 * (k + 1)
    if variant == "mhc":
        return {
            "projection": size.draw(n * width, 2 * n + n * n, scale=(n * width) ** -0.5, seed=seed),
            "bias": size.draw(2 * n + n * n, seed=seed + 1),
            "alpha": size.draw(3, scale=0.1, seed=seed + 2) + 0.5,
        }
    static = torch.zeros(n, n + 2)
    static[k % n, 0] = static[:, -1] = 1.0
    static[:, 1:-1] = torch.eye(n)
    return {
        "projection": size.draw(width, n + 2, scale=width**-0.5, seed=seed),
        "static": static.to(size.device, size.dtype) + size.draw(n, n + 2, scale=0.1, seed=seed + 1),
        "scale": size.draw(2, scale=0.1, seed=seed + 2) + 0.5,
        "norm_weight": 1 + size.draw(width, scale=0.1, seed=seed + 3),
    }


@case(
    "hyper-step",
    f"Hyper-Connections around {SUBLAYERS} sublayers whose outputs are given: mhc (Sinkhorn), hc (RMSNorm, tanh)",
    {"mhc": ("n", "width"), "hc": ("n", "width")},
    vectors=lambda variant, n: n,
    least_n=2,
)
def _hyper_step(size: Size, variant: str) -> Problem:
    n = size.n
    inputs = {"streams": size.per_token(n, size.width, seed=1)}
    shared = set()
    for k in range(SUBLAYERS):
        inputs[f"layer_output.{k}"] = size.per_token(size.width, seed=100 + k)
        for name, value in _hyper_parameters(size, variant, k).items():
            inputs[f"{name}.{k}"] = value
            shared.add(f"{name}.{k}")
    family: hyper.Manifold | hyper.HyperDynamic
    names: tuple[str, ...]
    if variant == "mhc":
        family = hyper.Manifold(n, SINKHORN_ITERATIONS, EPS)
        names, coefficients = ("projection", "bias", "alpha"), manifold_reference
    else:
        family = hyper.HyperDynamic(n, "rms", True, EPS)
        names = ("projection", "static", "scale", "norm_weight")

        def coefficients(streams, *parameters):
            return family.reference(streams, *(p.to(compute_dtype(p.dtype)) for p in parameters), None)

    def parameters(x: Tensors, k: int) -> tuple:
        found = tuple(x[f"{name}.{k}"] for name in names)
        return found if variant == "mhc" else (*found, None)

    def reference(x: Tensors) -> Tensors:
        streams, outputs = x["streams"], {}
        for k in range(SUBLAYERS):
            made = coefficients(streams, *(x[f"{name}.{k}"] for name in names))
            outputs[f"h.{k}"] = _read(streams, made[..., n + 1, :])
            streams = hyper.mix_reference(x[f"layer_output.{k}"], streams, made[..., :n, :], made[..., n, :])
        return {**outputs, "new_streams": streams}

    def function(x: Tensors) -> Tensors:
        streams, outputs = x["streams"], {}
        outputs["h.0"], made = hyper.begin(streams, family, parameters(x, 0))
        for k in range(1, SUBLAYERS):
            outputs[f"h.{k}"], streams, made = hyper.step(
                x[f"layer_output.{k - 1}"], streams, made, family, parameters(x, k)
            )
        return {**outputs, "new_streams": hyper.write(x[f"layer_output.{SUBLAYERS - 1}"], streams, made)}

    problem = _problem(
        inputs, shared, reference=reference, function=function, floor=floor.hyper(n, SUBLAYERS),
        width=size.width,
    )  # fmt: skip
    adapters = peers.mhc if variant == "mhc" else peers.hyper_connections
    problem.peers = adapters(size, problem.inputs, SUBLAYERS, EPS)
    return problem
