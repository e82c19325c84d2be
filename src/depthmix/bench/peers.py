"""Other packages' implementations of the cases' equations.

None is needed: each is imported when it is prepared, and a package that is not there is listed as such. What is
assumed of a package's interface stands beside its adapter, with the version it was read from; where an assumption
no longer holds, the package fails or its result is refused by the check, and the rest goes on.

An implementation gets its inputs in its own layout: stacking sources that it wants stacked is not timed.
"""

import functools

import torch

from .case import Adapted, Peer, Size, Tensors, leaf

PACKAGES = (
    "fla-core",
    "fast-attnres",
    "flash-attn-res",
    "liger-kernel",
    "hyper-connections",
    "transformer-engine",
)


def _copies(x: Tensors, names) -> Tensors:
    return {name: leaf(x[name].clone()) for name in names}


def _low_precision(size: Size) -> str | None:
    return None if size.dtype == torch.bfloat16 else "takes bf16 only"


def _power_of_two(width: int) -> str | None:
    return None if width & (width - 1) == 0 else f"takes a D that is a power of two only, not {width}"


# --- Attention Residuals ------------------------------------------------------------------------


def attnres(size: Size, x: Tensors, count: int, eps: float) -> list[Peer]:
    """``x``: ``source.i [N, D]`` and ``weight [D]``; out ``h``."""
    names = [f"source.{i}" for i in range(count)]

    def fla(function: str, **options) -> Adapted:
        # fla-core 0.6.0: (query [D], residuals: list of [..., D], rms_weight [D], rms_eps=, scale=, ...).
        import fla.ops.attnres

        call = getattr(fla.ops.attnres, function)
        ones = torch.ones(size.width, dtype=size.dtype, device=size.device)
        return Adapted(
            _copies(x, (*names, "weight")),
            lambda y: {
                "h": call(y["weight"], [y[k] for k in names], ones, rms_eps=eps, scale=1.0, **options)
            },
        )

    def fast() -> Adapted:
        # fast-attnres 2.1.0: attnres(list of [..., D], query [D], eps=, scale=), bf16 on CUDA.
        from attnres import attnres as call

        return Adapted(
            _copies(x, (*names, "weight")),
            lambda y: {"h": call([y[k] for k in names], y["weight"], eps=eps, scale=1.0)},
        )

    def _stacked(run) -> Adapted:
        leaves = {
            "stacked": leaf(torch.stack([x[k].detach() for k in names])),
            "weight": leaf(x["weight"].clone()),
        }

        def back(gradients: Tensors) -> Tensors:
            unbound = dict(zip(names, gradients["stacked"].view(count, *x[names[0]].shape), strict=True))
            return {**unbound, "weight": gradients["weight"]}

        return Adapted(leaves, run, back)

    def flash() -> Adapted:
        # flash-attn-res 0.1.12: phase 1 on [k, B, T, D] with queries [Q, D] -> (out [Q, B, T, D] bf16, lse).
        from flash_attn_res.ops.phase_1 import phase_1_batched_attention_triton_op as call

        def run(y):
            out, _ = call(y["stacked"].unsqueeze(1), y["weight"].unsqueeze(0), eps)
            return {"h": out.view(size.tokens, size.width)}

        return _stacked(run)

    def liger() -> Adapted:
        # liger-kernel 0.8.5: liger_attn_res(V [k, B, T, D], w_query [D], w_norm [D], eps).
        from liger_kernel.transformers.functional import liger_attn_res

        ones = torch.ones(size.width, dtype=size.dtype, device=size.device)

        def run(y):
            out = liger_attn_res(y["stacked"].unsqueeze(1), y["weight"], ones, eps)
            return {"h": out.view(size.tokens, size.width)}

        return _stacked(run)

    return [
        Peer("fla naive_attnres", "fla-core", lambda: fla("naive_attnres")),
        *(
            Peer(
                f"fla fused_attnres, level {level}",
                "fla-core",
                functools.partial(fla, "fused_attnres", checkpoint_level=level),
                device="cuda",
            )
            for level in (0, 1)
        ),
        Peer("fast-attnres", "fast-attnres", fast, "cuda", _low_precision(size)),
        Peer(
            "flash-attn-res phase 1", "flash-attn-res", flash, "cuda",
            _low_precision(size) or _power_of_two(size.width),
        ),
        # Beyond 32 sources some of its versions leave sources out: the check finds that.
        Peer("liger attn_res", "liger-kernel", liger, "cuda"),
    ]  # fmt: skip


def attnres_block(size: Size, x: Tensors, sources: int, reads: int, eps: float) -> list[Peer]:
    """``x``: ``source.i``, ``layer_output.j [N, D]`` and ``query.j [D]``; out ``h.j`` and ``running_sum``."""
    names = [f"source.{i}" for i in range(sources)]
    others = [f"{kind}.{j}" for kind in ("layer_output", "query") for j in range(reads)]

    def fla(level: int) -> Adapted:
        from fla.ops.attnres import fused_attnres as call

        ones = torch.ones(size.width, dtype=size.dtype, device=size.device)

        def run(y):
            given, running, outputs = [y[k] for k in names], None, {}
            for j in range(reads):
                output = y[f"layer_output.{j}"]
                running = output if running is None else running + output
                outputs[f"h.{j}"] = call(
                    y[f"query.{j}"], [*given, running], ones, rms_eps=eps, scale=1.0, checkpoint_level=level
                )
            return {**outputs, "running_sum": running}

        return Adapted(_copies(x, (*names, *others)), run)

    def flash() -> Adapted:
        # flash-attn-res 0.1.12: phase 1 as above; phase 2 (running [B, T, D], query [D], out_j, lse_j, eps).
        from flash_attn_res.ops.phase_1 import phase_1_batched_attention_triton_op as phase_1
        from flash_attn_res.ops.phase_2 import phase_2_online_softmax_merge_triton_op as phase_2

        leaves = {
            "stacked": leaf(torch.stack([x[k].detach() for k in names]).unsqueeze(1)),
            **_copies(x, others),
        }

        def run(y):
            queries = torch.stack([y[f"query.{j}"] for j in range(reads)])
            means, lse = phase_1(y["stacked"], queries, eps)
            running, outputs = None, {}
            for j in range(reads):
                output = y[f"layer_output.{j}"].unsqueeze(0)
                running = output if running is None else running + output
                outputs[f"h.{j}"] = phase_2(running, queries[j], means[j], lse[j], eps).squeeze(0)
            return {**outputs, "running_sum": running.squeeze(0)}

        def back(gradients: Tensors) -> Tensors:
            unbound = dict(zip(names, gradients["stacked"].squeeze(1), strict=True))
            return {**unbound, **{k: gradients[k] for k in others}}

        return Adapted(leaves, run, back)

    return [
        *(
            Peer(
                f"fla fused_attnres, level {level}", "fla-core", functools.partial(fla, level), device="cuda"
            )
            for level in (0, 1)
        ),
        Peer(
            "flash-attn-res two-phase", "flash-attn-res", flash, "cuda",
            _low_precision(size) or _power_of_two(size.width),
        ),
    ]  # fmt: skip


# --- Hyper-Connections --------------------------------------------------------------------------


def mhc(size: Size, x: Tensors, sublayers: int, eps: float) -> list[Peer]:
    """``x``: ``streams [N, n, D]``, ``layer_output.k [N, D]`` and, of every sublayer, ``projection.k [nD, n^2 + 2n]``,
    ``bias.k``, ``alpha.k [3]``; out ``h.k`` and ``new_streams``."""
    n, width, tokens = size.n, size.width, size.tokens
    iterations = 20

    def liger() -> Adapted:
        # liger-kernel 0.8.5: coefficients (x [..., n, D], phi [nD, M], b [M], three alphas, tmax=, ...) with H_res
        # [out, in], whose *columns* are divided last where ours are rows: alike once the iteration has converged.
        from liger_kernel.transformers import functional as liger_kernel

        def run(y):
            streams, outputs = y["streams"], {}
            for k in range(sublayers):
                pre, post, residual = liger_kernel.liger_mhc_coeffs(
                    streams, y[f"projection.{k}"], y[f"bias.{k}"].float(), *y[f"alpha.{k}"].float(),
                    allow_fp32=True, tmax=iterations, rms_eps=eps, pre_eps=0.0, sinkhorn_eps=0.0,
                )  # fmt: skip
                outputs[f"h.{k}"] = liger_kernel.liger_mhc_pre(streams, pre)
                streams = liger_kernel.liger_mhc_post_res(streams, y[f"layer_output.{k}"], post, residual)
                outputs[f"h.{k}"] = outputs[f"h.{k}"].to(size.dtype)
                streams = streams.to(size.dtype)
            return {**outputs, "new_streams": streams}

        return Adapted(_copies(x, x), run)

    def transformer_engine() -> Adapted:
        # transformer-engine 2.14: streams [s, b, C, n] with n = 4; phi [24, nC], nC in the order of that layout;
        # beta [1, 24]; H_res [from, to], so that its logits are the transpose of ours. What it divides last is
        # not documented; alike once the iteration has converged.
        from transformer_engine.pytorch.triton import mhc as engine

        order = torch.arange(n * n, device=size.device).view(n, n).t().reshape(-1) + 2 * n
        order = torch.cat([torch.arange(2 * n, device=size.device), order])
        leaves = {"streams": leaf(x["streams"].transpose(1, 2).unsqueeze(1).contiguous())}
        for k in range(sublayers):
            projection = x[f"projection.{k}"].view(n, width, -1).transpose(0, 1).reshape(n * width, -1)
            leaves[f"projection.{k}"] = leaf(projection[:, order].t().contiguous())
            leaves[f"bias.{k}"] = leaf(x[f"bias.{k}"][order].float().unsqueeze(0))
            leaves[f"alpha.{k}"] = leaf(x[f"alpha.{k}"].float())
            leaves[f"layer_output.{k}"] = leaf(x[f"layer_output.{k}"].unsqueeze(1).clone())

        def run(y):
            streams, outputs = y["streams"], {}
            for k in range(sublayers):
                made, mean_square = engine.mhc_fused_projection(
                    streams.reshape(tokens, n * width), y[f"projection.{k}"]
                )
                pre, post, residual = engine.mhc_fused_scale(
                    made, y[f"alpha.{k}"], y[f"bias.{k}"], mean_square, n
                )
                residual = engine.mhc_fused_sinkhorn(residual.reshape(tokens, 1, n, n), n, True, iterations)
                outputs[f"h.{k}"] = engine.mhc_fused_aggregate(streams, pre.reshape(tokens, 1, n), n)
                outputs[f"h.{k}"] = outputs[f"h.{k}"].squeeze(1)
                streams = engine.mhc_fused_expand_combine(
                    y[f"layer_output.{k}"], None, post.reshape(tokens, 1, n), streams, residual, n
                )
            return {**outputs, "new_streams": streams.squeeze(1).transpose(1, 2)}

        def back(gradients: Tensors) -> Tensors:
            # Those of the parameters are in another order; streams and outputs hang on all of them.
            found = {"streams": gradients["streams"].squeeze(1).transpose(1, 2)}
            for k in range(sublayers):
                found[f"layer_output.{k}"] = gradients[f"layer_output.{k}"].squeeze(1)
            return found

        return Adapted(leaves, run, back)

    four = None if n == 4 else f"takes n = 4 only, not {n}"
    return [
        Peer("liger mhc", "liger-kernel", liger, "cuda"),
        Peer("transformer-engine mhc", "transformer-engine", transformer_engine, "cuda", four),
    ]


def hyper_connections(size: Size, x: Tensors, sublayers: int, eps: float) -> list[Peer]:
    """``x``: ``streams``, ``layer_output.k`` and ``projection.k [D, n + 2]``, ``static.k [n, n + 2]``, ``scale.k [2]``,
    ``norm_weight.k [D]``; out ``h.k`` and ``new_streams``."""
    n = size.n

    def prepare() -> Adapted:
        # hyper-connections 0.4.11: module(streams [(B n), T, D]) -> (h [B, T, D], write); its RMSNorm has no eps
        # and a weight less 1. Its mHC takes other coefficients than the report's and has no place here.
        from hyper_connections import HyperConnections

        leaves = {"streams": leaf(x["streams"].transpose(0, 1).contiguous())}
        modules = []
        for k in range(sublayers):
            module = HyperConnections(n, dim=size.width, layer_index=k).to(size.device, size.dtype)
            projection, static = x[f"projection.{k}"], x[f"static.{k}"]
            with torch.no_grad():
                module.static_alpha.copy_(static[:, :-1])
                module.static_beta.copy_(static[:, -1])
                module.dynamic_alpha_fn.copy_(projection[:, :-1])
                module.dynamic_beta_fn.copy_(projection[:, -1])
                module.dynamic_alpha_scale.copy_(x[f"scale.{k}"][0])
                module.dynamic_beta_scale.copy_(x[f"scale.{k}"][1])
                module.norm.gamma.copy_(x[f"norm_weight.{k}"] - 1)
            modules.append(module)
            leaves[f"layer_output.{k}"] = leaf(x[f"layer_output.{k}"].unsqueeze(0).clone())
            leaves |= {f"{name}.{k}": p for name, p in module.named_parameters()}

        def run(y):
            streams, outputs = y["streams"], {}
            for k, module in enumerate(modules):
                h, write = module(streams)
                outputs[f"h.{k}"] = h.squeeze(0)
                streams = write(y[f"layer_output.{k}"])
            return {**outputs, "new_streams": streams.transpose(0, 1)}

        def back(gradients: Tensors) -> Tensors:
            found = {"streams": gradients["streams"].transpose(0, 1)}
            for k in range(sublayers):
                found[f"layer_output.{k}"] = gradients[f"layer_output.{k}"].squeeze(0)
                alpha, beta = gradients[f"dynamic_alpha_fn.{k}"], gradients[f"dynamic_beta_fn.{k}"]
                found[f"projection.{k}"] = torch.cat([alpha, beta.unsqueeze(-1)], 1)
                alpha, beta = gradients[f"static_alpha.{k}"], gradients[f"static_beta.{k}"]
                found[f"static.{k}"] = torch.cat([alpha, beta.unsqueeze(-1)], 1)
                found[f"norm_weight.{k}"] = gradients[f"norm.gamma.{k}"]
            return found

        return Adapted(leaves, run, back)

    return [Peer("hyper-connections", "hyper-connections", prepare)]
