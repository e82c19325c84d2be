"""All numbers of two tiny models against arrays that were stored once: what a figure shows does not change unseen.

``python tests/diagnostics/test_reference.py`` writes the arrays anew, for when they are meant to change.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from depthmix import GPT, GPTConfig
from depthmix.diagnostics.arrays import Diagnosis
from depthmix.diagnostics.run import Extent, diagnose
from depthmix.diagnostics.subject import Run

FOLDER = Path(__file__).parent / "reference"
MODELS = "prenorm", "mgr-competitive"


def found(residual):
    """Of a model in float64 whose weights are numpy's: the same numbers on every machine, to rounding."""
    config = GPTConfig(
        vocab_size=40, n_layer=4, d_model=12, n_head=2, seq_len=24, residual=residual, n_streams=3
    )
    model = GPT(config, seed=0).double().eval()
    draw = np.random.Generator(np.random.PCG64(7))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(draw.standard_normal(parameter.shape))
            parameter.copy_(1 + values / 8 if name.endswith("norm.weight") else values / 4)
    texts = torch.from_numpy(draw.integers(0, 40, (9, 10)))
    return diagnose(Run(model, name=residual), texts, Extent(batch=4, removal_texts=6, gradient_texts=5))


@pytest.mark.parametrize("residual", MODELS)
def test_every_array_is_what_was_stored(residual):
    now, stored = found(residual), Diagnosis.load(FOLDER / f"{residual}.npz")
    assert now.arrays.keys() == stored.arrays.keys()
    assert now.missing.keys() == stored.missing.keys()
    for name, array in stored.arrays.items():
        assert (now.arrays[name].axes, now.arrays[name].unit) == (array.axes, array.unit), name
        if name == "gate_counts":  # a value on an edge may fall on either side of it
            assert np.abs(np.cumsum(now[name], 1) - np.cumsum(array.values, 1)).max() <= 1
        else:
            # Squares and samples are taken in fp32, whose sums differ between machines; streams are reconstructed in
            # float64, where an error is rounding itself.
            bound = (
                dict(rtol=1e-5, atol=1e-9) if name != "reconstruction_measured" else dict(rtol=0, atol=1e-12)
            )
            np.testing.assert_allclose(now[name], array.values, **bound, err_msg=name)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for residual in MODELS:
        one = found(residual)
        one.seconds = {}
        one.save(FOLDER / f"{residual}.npz")
