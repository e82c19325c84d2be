"""Diagnoses with every array of the schema and no model behind them, for tests of their report.

``fabricate("prenorm")`` has no streams, gates or pools, ``"attnres"`` pools sources, ``"mgr"`` has streams that are
appended until there are ``n_streams`` and lerp from then on. Numbers are seeded and shaped like a trained model's:
outputs that grow under PreNorm, a first block that cannot be spared, small gates with a few large ones.
"""

import numpy as np

from depthmix.diagnostics.arrays import Array, Diagnosis

NO_STREAMS = "the connection has no parallel streams"
NO_GATES = "the connection has no gates"

AXES = {
    "output_rms": ("block",),
    "sublayer_output_rms": ("sublayer",),
    "stream_rms": ("sublayer", "stream"),
    "gradient_rms": ("block",),
    "angular_distance": ("representation", "from", "to"),
    "removal_delta": ("block",),
    "removal_se": ("block",),
    "removal_base": (),
    **{
        f"top_{what}{of}": ("sublayer", "rank")
        for what in ("hidden", "output")
        for of in ("", "_text", "_position", "_channel", "_token")
    },
    "median_hidden": ("sublayer",),
    "median_output": ("sublayer",),
    "stream_max": ("sublayer", "stream"),
    "gate_counts": ("sublayer", "bin"),
    "gate_edges": ("sublayer", "edge"),
    "gate_mean": ("sublayer",),
    "gate_min": ("sublayer",),
    "gate_max": ("sublayer",),
    "gate_quantiles": ("sublayer", "quantile"),
    "gate_mean_stream": ("sublayer", "stream"),
    "pool_mean": ("sublayer", "source"),
    "pool_entropy": ("sublayer",),
    "amplification_mean": ("sublayer", "stream"),
    "amplification_max": ("sublayer", "stream"),
    "reconstruction_measured": ("sublayer",),
    "reconstruction_predicted": ("sublayer",),
    "reconstruction_kept": ("sublayer",),
    "reconstruction_anchor": ("sublayer",),
    "effective_rank": ("depth", "representation"),
    "stream_similarity": ("depth", "stream", "stream"),
    "static_score": ("stream",),
    "static_streams": ("stream",),
    "mixing_matrix": ("reader", "source"),
    "mixing_source_rms": ("source",),
    "not_finite": ("sublayer",),
}


def put(diagnosis, **values):
    """Replace arrays; ``None`` takes one away."""
    for name, value in values.items():
        if value is None:
            diagnosis.arrays.pop(name, None)
        else:
            diagnosis.arrays[name] = Array(np.asarray(value), AXES[name], "", name)
    return diagnosis


def fabricate(kind="mgr", n_layer=4, n_streams=4, seed=0, name=None, width=64, detail=""):
    rng = np.random.default_rng(seed)
    sublayers = 2 * n_layer
    streams = n_streams if kind == "mgr" else 0
    first_lerp = max(streams - 1, 0)
    subject = {
        "name": name or f"{kind}-s{seed}",
        "residual": {"mgr": "mgr-competitive", "attnres": "attnres-block:blocks=4"}.get(kind, kind),
        "detail": detail or f"validation loss {3.3 - 0.01 * seed:.3f}, step 2,000",
        "n_layer": n_layer,
        "d_model": width,
        "n_streams": streams,
        "parameters": 1_234_567 + seed,
        "kept_because": {
            str(block): "it appends streams that later blocks read" for block in range(-(-first_lerp // 2))
        },
    }
    diagnosis = Diagnosis(subject, {"texts": 512, "length": 256, "source": "shakespeare, validation"})

    growth = np.linspace(1, 1 + n_layer * (0.6 if kind == "prenorm" else 0.05), n_layer)
    noise = lambda *shape: np.exp(0.15 * rng.standard_normal(shape))  # noqa: E731
    put(
        diagnosis,
        output_rms=growth * noise(n_layer),
        sublayer_output_rms=0.4 * np.repeat(growth, 2) * noise(sublayers),
        gradient_rms=1e-5 * noise(n_layer) * (np.linspace(4, 1, n_layer) if kind == "prenorm" else 1),
        not_finite=np.zeros(sublayers, np.int64),
    )
    _distance(diagnosis, rng, n_layer, streams)
    _removal(diagnosis, rng, n_layer, kind)
    _activations(diagnosis, rng, sublayers, width, kind)
    put(diagnosis, effective_rank=(0.5 * width * noise(n_layer + 1, 1 + streams)))
    matrix = np.tril(np.ones((sublayers + 1, sublayers + 1)))
    if kind != "prenorm":
        matrix = matrix * rng.dirichlet(np.ones(sublayers + 1), sublayers + 1)
    put(diagnosis, mixing_matrix=matrix, mixing_source_rms=noise(sublayers + 1))
    if streams:
        _streams(diagnosis, rng, sublayers, streams, first_lerp)
        _gates(diagnosis, rng, sublayers, streams, first_lerp)
    else:
        for figure in ("streams", "amplification", "reconstruction"):
            diagnosis.missing[figure] = NO_STREAMS
        diagnosis.missing["gates"] = NO_GATES
    if kind == "prenorm":
        diagnosis.missing["pools"] = "the connection pools nothing"
    else:
        sources = streams or sublayers + 1
        pool, entropy = np.full((sublayers, sources), np.nan), np.full(sublayers, np.nan)
        for s in range(1, sublayers):
            k = min(sources, s + 2)
            weights = rng.dirichlet(np.full(k, 2.0))
            pool[s, :k], entropy[s] = weights, -(weights * np.log(weights)).sum() / np.log(k)
        put(diagnosis, pool_mean=pool, pool_entropy=entropy)
    diagnosis.seconds = {"forward": 12.5, "removal": 60.25}
    return diagnosis


def _distance(diagnosis, rng, n_layer, streams):
    depths = n_layer + 1
    walk = np.cumsum(rng.standard_normal((1 + streams, depths, 32)) * 0.4, axis=1) + rng.standard_normal(
        (1 + streams, 1, 32)
    )
    if streams > 2:
        walk[3] = walk[3, :1] + 1e-3 * rng.standard_normal((depths, 32))  # stream 2 stays as it is
    unit = walk / np.linalg.norm(walk, axis=-1, keepdims=True)
    distance = np.arccos(np.clip(np.einsum("rid,rjd->rij", unit, unit), -1, 1)) / np.pi
    distance[:, np.arange(depths), np.arange(depths)] = 0
    distance[:, np.tri(depths, k=-1, dtype=bool)] = np.nan
    for stream in range(streams):
        born = -(-stream // 2)
        distance[1 + stream, :born] = np.nan
    put(diagnosis, angular_distance=distance)


def _removal(diagnosis, rng, n_layer, kind):
    delta = 0.04 * rng.random(n_layer) + 0.002
    if kind == "prenorm":
        delta[0] = 6.5
    else:
        delta[-1] = 1.2
    for block in diagnosis.subject["kept_because"]:
        if int(block) < n_layer:
            delta[int(block)] = np.nan
    put(diagnosis, removal_delta=delta, removal_se=np.abs(delta) * 0.05 + 0.002, removal_base=np.array(3.21))


def _activations(diagnosis, rng, sublayers, width, kind):
    for what in ("hidden", "output"):
        top = -np.sort(-rng.gamma(9.0, 1.5, (sublayers, 3)), axis=1)
        if kind == "prenorm" and what == "hidden":
            top[sublayers // 3 :] *= [40, 25, 4]
        put(
            diagnosis,
            **{
                f"top_{what}": top,
                f"top_{what}_text": rng.integers(0, 512, (sublayers, 3)),
                f"top_{what}_position": rng.integers(0, 256, (sublayers, 3)),
                f"top_{what}_channel": rng.integers(0, width, (sublayers, 3)),
                f"top_{what}_token": rng.integers(0, 1000, (sublayers, 3)),
                f"median_{what}": 0.25 * np.exp(0.1 * rng.standard_normal(sublayers)),
            },
        )


def _streams(diagnosis, rng, sublayers, streams, first_lerp):
    exists = np.arange(streams) <= np.arange(sublayers)[:, None] + 1
    largest = rng.gamma(9.0, 2.0, (sublayers, streams))
    similarity = np.full((sublayers // 2 + 1, streams, streams), np.nan)
    for depth in range(sublayers // 2 + 1):
        k = min(streams, 2 * depth + 1)
        points = rng.standard_normal((k, 8)) + 0.5
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        similarity[depth, :k, :k] = points @ points.T
    score = rng.uniform(0.2, 0.5, streams)
    if streams > 2:
        score[2] = 0.01
    lerps = np.arange(sublayers)[:, None] >= first_lerp
    steps = np.where(lerps, rng.uniform(0.01, 0.12, (sublayers, streams)), 0).cumsum(0)
    mean = np.where(lerps, steps, np.nan)
    where = lerps[:, 0]
    measured = np.where(where, 1e-6 * 10 ** (0.5 * np.arange(sublayers) % 3), np.nan)
    anchor = np.arange(sublayers) % 6 == first_lerp % 6
    put(
        diagnosis,
        stream_rms=np.where(exists, largest / 9, np.nan),
        stream_max=np.where(exists, largest, np.nan),
        stream_similarity=similarity,
        static_score=score,
        static_streams=score < 0.05,
        amplification_mean=mean,
        amplification_max=2.5 * mean,
        reconstruction_measured=measured,
        reconstruction_predicted=6 * measured,
        reconstruction_kept=np.where(where, np.where(anchor, 1.0, 0.01), np.nan),
        reconstruction_anchor=np.where(where, anchor, np.nan),
    )


def _gates(diagnosis, rng, sublayers, streams, first_lerp):
    edges = np.linspace(0, 1, 1001)
    counts = np.zeros((sublayers, 1000), np.int64)
    found = {name: np.full(sublayers, np.nan) for name in ("gate_mean", "gate_min", "gate_max")}
    quantiles, by_stream = np.full((sublayers, 5), np.nan), np.full((sublayers, streams), np.nan)
    for s in range(first_lerp, sublayers):
        gates = rng.beta(1.2 + 0.5 * np.arange(streams) / streams, 18, (3000, streams))
        gates.flat[:3] = rng.uniform(0.5, 0.9, 3)
        counts[s] = np.histogram(gates, edges)[0]
        found["gate_mean"][s], found["gate_min"][s] = gates.mean(), gates.min()
        found["gate_max"][s] = gates.max()
        quantiles[s] = np.quantile(gates, (0.05, 0.25, 0.5, 0.75, 0.95))
        by_stream[s] = gates.mean(0)
    put(
        diagnosis,
        gate_counts=counts,
        gate_edges=np.tile(edges, (sublayers, 1)),
        gate_quantiles=quantiles,
        gate_mean_stream=by_stream,
        **found,
    )
