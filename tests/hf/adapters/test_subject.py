"""Diagnosis of adapted models: what is shown is what the model computed, and its connection's equations hold in it."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from families import LAYERS, PARALLEL, TEXT, build, build_tokenizer, moved

from depthmix import MixingMap, adapt, cli, mixing_error, mixing_map
from depthmix.diagnostics.adapted import AdaptedSubject
from depthmix.diagnostics.huggingface import HuggingFaceSubject
from depthmix.diagnostics.opening import open_huggingface
from depthmix.diagnostics.run import Extent, diagnose
from depthmix.errors import UserError

pytestmark = pytest.mark.hf
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def near(a, b, times=1.0):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=times * 1e-5 * b.abs().max().item())


@pytest.mark.parametrize("family, residual", [
    ("llama", "mgr-competitive"), ("llama", "hc"), ("gemma2", "attnres"), ("phi", "mgr-independent"),
    ("gptj", "mgr-independent"), ("opt", "highway"),
])  # fmt: skip
def test_a_saved_folder_is_read_and_stepped_through(family, residual, tmp_path):
    model = moved(adapt(build(family), residual, n_streams=2, start="prenorm-scaled"))
    model.save_pretrained(tmp_path)
    subject = open_huggingface(tmp_path)
    assert isinstance(subject, AdaptedSubject) and subject.residual == residual
    assert subject.describe()["residual"] == residual and residual in subject.detail
    carry = subject.begin(IDS)
    for index in range(LAYERS):
        carry = subject.block(index, carry)
    near(subject.head(subject.end(carry)), model(input_ids=IDS).logits)


def test_points_obey_the_equations_of_the_connection():
    """Lerp and pool with the gates and weights that are shown, in every block behind the ramp."""
    subject = AdaptedSubject(moved(adapt(build(), "mgr-competitive", n_streams=2)).double(), name="one")
    assert subject.n_streams == 2 and subject.convex_gates(3) and subject.gate_range(3) == (0.0, 1.0)
    with subject.capture("*") as c:
        subject.hidden(IDS)
    for i in range(1, LAYERS):
        at = lambda point, i=i: c[f"blocks.{i}.hook_{point}"]  # noqa: E731
        before = c[f"blocks.{i - 1}.hook_streams"]
        for y, suffix, read in ("attn_out", "_mid", "resid_mid"), ("mlp_out", "", "resid_post"):
            streams, gate, pool = at("streams" + suffix), at("gate" + suffix), at("pool" + suffix)
            near(streams, before + gate.unsqueeze(-1) * (at(y).unsqueeze(-2) - before))
            near(at(read), (pool.unsqueeze(-1) * streams).sum(-2))
            before = streams
        assert torch.equal(at("resid_pre"), c[f"blocks.{i - 1}.hook_resid_post"])
    # What is read is multiplied where the model starts at another's function.
    scaled = AdaptedSubject(
        adapt(build(), "mgr-competitive", n_streams=2, start="prenorm-scaled"), name="one"
    )
    plain = HuggingFaceSubject(build(), name="plain")
    with scaled.capture("*") as c, plain.capture("*") as expected:
        scaled.hidden(IDS)
        plain.hidden(IDS)
    for name in expected:
        near(c[name], expected[name], 10)


@pytest.mark.parametrize("index", range(LAYERS))
def test_a_block_left_out(index):
    """With PreNorm, a model without it; with gates, the rest goes on from the state as it was."""
    plain = build()
    subject = AdaptedSubject(adapt(copy.deepcopy(plain), "prenorm"), name="one")
    del plain.model.layers[index]
    plain.config.num_hidden_layers -= 1
    near(without(subject, index), plain(input_ids=IDS, use_cache=False).logits)
    mixed = AdaptedSubject(moved(adapt(build(), "mgr-independent", n_streams=2)), name="one")
    if index == 0:
        assert "appends" in mixed.kept_because(0)
    else:
        assert mixed.kept_because(index) is None
        changed = without(mixed, index) - mixed.head(mixed.hidden(IDS))
        assert changed.isfinite().all() and changed.abs().max() > 0


def without(subject, skip):
    carry = subject.begin(IDS)
    for index in range(LAYERS):
        carry = subject.without(index, carry) if index == skip else subject.block(index, carry)
    return subject.head(subject.end(carry))


@pytest.mark.parametrize("family, residual", [("llama", "mgr-competitive"), ("phi", "mhc")])
def test_a_whole_diagnosis(family, residual):
    with torch.enable_grad():
        subject = AdaptedSubject(moved(adapt(build(family), residual, n_streams=2)), name="one")
        found = diagnose(subject, IDS, Extent(batch=2), source="ids")
    assert found.subject["residual"] == residual
    assert any("gate" in name for name in found.arrays) and not found.warnings


@pytest.mark.parametrize("family, residual", [
    ("llama", "mgr-competitive"), ("opt", "review"), ("phi", "attnres"), ("gpt2", "hc"),
])  # fmt: skip
def test_mixing_map(family, residual):
    """What is read is the sum that the map says, in streams too; a start at PreNorm has coefficients of one."""
    model = adapt(build(family), residual, n_streams=2, start="prenorm-scaled").double()
    found = mixing_map(model, IDS)
    sublayers = LAYERS * (1 if family in PARALLEL else 2)
    assert found.labels[-1] == (f"block {LAYERS}" if family in PARALLEL else f"mlp {LAYERS}")
    near(found.matrix, torch.ones(sublayers + 1, sublayers + 1, dtype=torch.float64).tril())
    model = moved(model).train()
    assert mixing_error(model, IDS) < 1e-10 and model.training
    other = mixing_map(model, IDS).matrix
    assert (other - found.matrix).abs().max() > 1e-2


def test_map_command(tmp_path, capsys):
    model = moved(adapt(build(), "mgr-independent", n_streams=2))
    model.save_pretrained(tmp_path / "mixed")
    build_tokenizer(eos_token="<end>").save_pretrained(tmp_path / "mixed")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    words = ["map", str(tmp_path / "mixed"), "--out", str(tmp_path / "map.png"), "--device", "cpu", "--npz"]
    assert cli.main(words) == 2 and "give --data" in capsys.readouterr().err
    assert cli.main([*words, "--data", str(tmp_path / "text.txt"), "--tokens", "100"]) == 0
    assert "mgr-independent" in capsys.readouterr().out
    ids = torch.tensor(build_tokenizer()(TEXT * 20, add_special_tokens=False)["input_ids"][:128]).view(2, 64)
    (path,) = tmp_path.glob("map-*.npz")
    near(MixingMap.load(path).matrix, mixing_map(model, ids).matrix)
    build().save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    words[1] = str(tmp_path / "plain")
    assert cli.main([*words, "--data", str(tmp_path / "text.txt")]) == 2
    assert "all ones" in capsys.readouterr().err


def test_an_export_is_told_its_way(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "depthmix"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="depthmix import"):
        open_huggingface(tmp_path)
