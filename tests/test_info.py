"""Counts from fake tensors equal those of real models."""

import dataclasses

import pytest
import torch

from depthmix import GPT
from depthmix.info import describe
from depthmix.memory import saved_bytes
from depthmix.presets import PRESETS, preset


def quick(residual, **changes):
    base = PRESETS["quick"]
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, n_layer=4, residual=residual), **changes
    )


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive"])
def test_description_equals_a_real_model(residual, precision):
    config = quick(residual, precision=precision)
    counts = describe(config)
    model = GPT(config.model, seed=0)
    if precision == "bf16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    assert counts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert sum(v for k, v in counts["parameters"].items() if k != "total") == counts["parameters"]["total"]
    # PreNorm, the same but for the connection, adds nothing.
    others = sum(p.numel() for p in GPT(quick("prenorm").model, seed=0).parameters())
    total = counts["parameters"]["total"]
    assert counts["connection_share"] == pytest.approx((total - others) / total)
    real = []
    for sequences in (1, 2):
        ids, targets = (torch.randint(0, 256, (sequences, 128)) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            real.append(saved_bytes(model, ids, targets))
    # Under autocast, weights are kept in bf16, once: what counts is what one more sequence adds.
    autocast = precision == "autocast"
    assert counts["activation_bytes_per_token"] == ((real[1] - real[0]) / 128 if autocast else real[1] / 256)


def test_flops_of_a_block_by_hand():
    config = quick("prenorm")
    width, tokens, vocab = 64, 128, config.model.vocab_size
    attention = 2 * 3 * width * width + 2 * width * width + 2 * 2 * tokens * width
    mlp = 2 * 2 * width * 4 * width
    assert describe(config)["flops_per_token"]["forward"] == 4 * (attention + mlp) + 2 * width * vocab


def test_gate_summary_is_in_the_description():
    gate = describe(quick("mgr-competitive"))["gate"]
    assert gate["ramp"] == 3 and gate["lerp"] == 5 and gate["n_streams"] == 4
    assert "gate" not in describe(quick("prenorm"))


def test_description_names_the_options():
    assert (
        describe(quick("mgr-review:gate=independent:n_streams=2"))["residual"]
        == "mgr-review:gate=independent"
    )


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'quick'"):
        preset("quik")
