"""What a configuration costs, before anything is built on a device.

The model is made of fake tensors (shapes and dtypes, no storage), so that even preset L is described
in seconds on a laptop; what is counted is what the model would really do on a CPU.
"""

import warnings

import torch
from torch._subclasses import FakeTensorMode

from .config import TrainConfig
from .memory import saved_bytes
from .model import GPT


def forward_flops(model: GPT) -> int:
    """Floating point operations per token of a forward pass at full sequence length.

    Matrix products with parameters (the tied embedding once, as the head) and the two products of
    attention, without the discount for the causal mask: nanoGPT's convention for model FLOPs
    utilisation. One multiply-add is two operations. Gates and pools are vector work, bound by
    memory traffic, and not counted.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    config = model.config
    return 2 * matrices + 4 * config.seq_len * config.attention_width * config.n_layer


def parameter_counts(model: GPT) -> dict[str, int]:
    """``total``, ``embedding`` (tied with the head), ``trunk`` (attention, MLP, norms) and ``connection``
    (gates, pools and whatever else the residual connection adds). A shared parameter counts once."""
    sites = [site for block in model.blocks for site in (block.attn_site, block.mlp_site)]

    def count(*modules) -> int:
        return sum(p.numel() for p in {p for module in modules for p in module.parameters()})

    counts = {
        "total": count(model),
        "embedding": count(model.embed),
        "connection": count(model.residual, *sites),
    }
    counts["trunk"] = counts["total"] - counts["embedding"] - counts["connection"]
    return counts


def activation_bytes_per_token(model: GPT, precision: str) -> float:
    """Bytes kept for the backward pass by one more sequence, over its tokens (:func:`depthmix.memory.saved_bytes`).

    What is kept once, whatever the batch (weights in the precision of autocast), is not in it. With
    ``stream_memory="inversion"`` the anchors that the gates demand are counted only where there are numbers to look at.
    """

    def saved(sequences: int) -> int:
        generator = torch.Generator(model.embed.weight.device).manual_seed(0)
        shape = sequences, model.config.seq_len
        ids = torch.randint(
            0, model.config.vocab_size, shape, generator=generator, device=model.embed.weight.device
        )
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "autocast"):
            return saved_bytes(model, ids, ids.clone())

    # Without autocast nothing is kept once, and a second pass would find the same.
    once = saved(1) if precision == "autocast" else 0
    return (saved(2) - once) / (1 if once else 2) / model.config.seq_len


def describe(config: TrainConfig) -> dict:
    """Counts for one model, as plain JSON types.

    ``parameters``: see :func:`parameter_counts`. ``connection_share``: the connection's part of them.
    ``flops_per_token``: ``forward`` (see :func:`forward_flops`) and ``training``, three times that.
    ``activation_bytes_per_token``: see :func:`activation_bytes_per_token`, in the run's precision.
    ``gate`` (Multi-Gate Residuals): ``ramp`` and ``lerp`` sublayers, ``bias`` put into the gate (Eq. 14)
    and the ``initial_beta`` per stream it gives.
    """
    model_config = config.model
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT(model_config, seed=0)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        activation_bytes = activation_bytes_per_token(model, config.precision)
    parameters = parameter_counts(model)
    flops = forward_flops(model)
    result = {
        "residual": model_config.label,
        "blocks": model_config.n_layer,
        "sublayers": model_config.n_sublayers,
        "parameters": parameters,
        "connection_share": parameters["connection"] / parameters["total"],
        "flops_per_token": {"forward": flops, "training": 3 * flops},
        "activation_bytes_per_token": activation_bytes,
        "tokens_per_step": config.tokens_per_step,
        "tokens": config.tokens_per_step * config.steps,
    }
    summarise = getattr(model.residual, "gate_summary", None)
    if summarise is not None:
        result["gate"] = summarise()
    return result
