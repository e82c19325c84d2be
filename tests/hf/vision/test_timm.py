"""A vision transformer of timm with another residual connection: nothing is specific to text."""

import copy

import pytest
import torch

pytest.importorskip("timm")

import timm

from depthmix import adapt, available_residuals
from depthmix.errors import UserError
from depthmix.optim import decay_groups

pytestmark = pytest.mark.hf


def build(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    model = timm.create_model(name, pretrained=False, **(sizes | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_of(model, seed=0):
    torch.manual_seed(seed)
    return model(IMAGES).log_softmax(-1)[:, 0].neg().mean()


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"drop_path_rate": 0.5, "proj_drop_rate": 0.2},
                                     {"class_token": False, "global_pool": "avg"}])  # fmt: skip
def test_its_own_connection_is_the_model_itself(options):
    model = build(**options)
    mixed = adapt(copy.deepcopy(model), "prenorm")
    assert torch.equal(mixed(IMAGES), model(IMAGES))
    gradients = []
    for m in (model, mixed):
        loss_of(m.train()).backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize(
    "residual", [name for name in available_residuals() if name not in ("moda", "siamese")]
)
def test_a_trained_one_goes_on_where_it_is_and_learns(residual):
    model = build()
    expected = model(IMAGES)
    mixed = adapt(model, residual, n_streams=2, start="prenorm-scaled").train()
    torch.testing.assert_close(mixed(IMAGES), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    optimizer = torch.optim.AdamW(decay_groups(mixed, 0.1), 1e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(mixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_checkpointing_and_state_dict():
    model = adapt(build(), "mgr-competitive", n_streams=2).train()

    def gradients():
        model.zero_grad()
        loss_of(model).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(gradients(), expected, strict=True):
        assert torch.equal(a, b)
    again = adapt(build(), "mgr-competitive", n_streams=2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))


@torch.no_grad()
def test_intermediates():
    """With PreNorm those of timm; else they end in what the model computes, and each is what the next block reads."""
    model = build()
    how = dict(indices=[0, 2], output_fmt="NLC", norm=True)
    expected = model.forward_intermediates(IMAGES, **how)
    found = adapt(copy.deepcopy(model), "prenorm").forward_intermediates(IMAGES, **how)
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert torch.equal(a, b)
    mixed = adapt(model, "mgr-competitive", n_streams=2)
    seen = []
    handle = mixed.blocks[1].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features, (first, last) = mixed.forward_intermediates(IMAGES, indices=[0, 2], output_fmt="NLC")
    handle.remove()
    assert torch.equal(first, seen[0][:, 1:]) and torch.equal(mixed.norm(last), features[:, 1:])
    assert torch.equal(features, mixed.forward_features(IMAGES))
    assert (
        len(mixed.forward_intermediates(IMAGES, indices=[0], stop_early=True, intermediates_only=True)) == 1
    )
    mixed.set_grad_checkpointing()
    with torch.enable_grad(), pytest.raises(UserError, match="no gradient checkpointing"):
        mixed.forward_intermediates(IMAGES)


def test_requests_that_cannot_be_met():
    with pytest.raises(UserError, match="no list of blocks"):
        adapt(torch.nn.Linear(2, 2), "hc")
    with pytest.raises(UserError, match="got a int"):
        adapt(3, "hc")
    # Post-norm blocks are something else.
    with pytest.raises(UserError, match="cannot be given another residual connection"):
        adapt(build(block_fn=timm.models.vision_transformer.ParallelThingsBlock), "hc")
