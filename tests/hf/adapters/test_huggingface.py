"""Models of transformers with another residual connection: against transformers itself, and against plain torch."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, LAYERS, PARALLEL, V, build, config_of, moved

import depthmix
from depthmix import adapt, available_residuals
from depthmix.adapters import huggingface
from depthmix.config import OptimConfig
from depthmix.errors import UserError
from depthmix.optim import build_optimizer, decay_groups, parameter_groups

pytestmark = pytest.mark.hf

T = 11
ADAPTED = [name for name in FAMILIES if name not in ("gpt-neox-sequential", "cohere", "gptj")]
JOINED = [name for name in available_residuals() if name != "moda"]
CONTINUED = [name for name in JOINED if name != "siamese"]

every_family = pytest.mark.parametrize("family", ADAPTED)
every_residual = pytest.mark.parametrize("residual", JOINED)


def tokens(batch=2, length=T, seed=2):
    return torch.randint(1, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_family
def test_its_own_connection_is_the_model_itself(family):
    """Adapted to PreNorm: the same bits, forward and backward, with padding, and what is generated."""
    model = build(family)
    mixed = adapt(copy.deepcopy(model), "prenorm")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results = []
    for m in (model, mixed):
        out = m(input_ids=ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        gradients = {name: p.grad for name, p in m.named_parameters()}
        text = m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        results.append((out.logits, gradients, text))
    (logits, gradients, text), (mixed_logits, mixed_gradients, mixed_text) = results
    assert gradients.keys() == mixed_gradients.keys()
    if family in PARALLEL:  # three terms, added in another order
        torch.testing.assert_close(mixed_logits, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    else:
        assert torch.equal(mixed_logits, logits)
        for name, gradient in gradients.items():
            assert torch.equal(mixed_gradients[name], gradient), name
    assert torch.equal(mixed_text, text)


@every_family
def test_generates_with_its_cache_what_it_computes_without(family):
    model = moved(adapt(build(family), "mgr-competitive", n_streams=3))
    # transformers has no experts in float64.
    model, close = (model, 1e-4) if family == "mixtral" else (model.double(), 1e-6)
    ids = tokens(3, 7)
    kept = model.generate(
        ids,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    again = ids
    for step in range(12):
        logits = model(input_ids=again, use_cache=False).logits[:, -1]
        most = logits.abs().max().item()
        torch.testing.assert_close(kept.logits[step], logits, rtol=0, atol=close * most, check_dtype=False)
        logits[:, 0] = -torch.inf  # the end
        again = torch.cat([again, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(again, kept.sequences)


@every_residual
def test_every_connection_generates_and_learns(residual):
    """Cache against none; every parameter gets a gradient; a state is nowhere kept."""
    model = moved(adapt(build(), residual, n_streams=2))
    ids = tokens()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        past, parts = None, []
        for piece in ids.split([5, 1, 4, 1], 1):
            out = model(input_ids=piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5 * whole.abs().max().item())

    def gradients(*losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def loss(seed):
        return model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss

    alone = [gradients(loss(seed)) for seed in (3, 4)]
    together = [loss(seed) for seed in (3, 4)]
    for name, gradient in gradients(*reversed(together)).items():
        assert gradient.abs().sum() > 0, name
        most = gradient.abs().max().item()
        torch.testing.assert_close(gradient, alone[0][name] + alone[1][name], rtol=0, atol=1e-4 * most)
    if residual != "prenorm":
        other = build()(input_ids=ids).logits
        assert (whole - other).abs().max() > 1e-3 * other.abs().max()


def test_equals_the_equations_on_its_own_modules():
    """Multi-Gate Residuals written out in plain torch, float64, around the modules of a Llama."""
    n = 3
    model = moved(adapt(build(), "mgr-competitive", n_streams=n)).double()
    ids = tokens()
    base = model.model
    position = torch.arange(T).unsqueeze(0)
    x = base.embed_tokens(ids)
    rotary = base.rotary_emb(x, position)
    mask = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]

    def score(s, w):
        return (s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ w / math.sqrt(32)

    def pool(streams, w):
        s = torch.stack(streams, -2)
        return (torch.softmax(score(s, w), -1).unsqueeze(-1) * s).sum(-2)

    streams, h = [x], x
    for block in base.layers:
        attention = lambda h, b=block: b.self_attn(  # noqa: E731
            hidden_states=b.input_layernorm(h), attention_mask=mask, position_embeddings=rotary
        )[0]
        mlp = lambda h, b=block: b.mlp(b.post_attention_layernorm(h))  # noqa: E731
        for sublayer, site in ((attention, block.attn_site), (mlp, block.mlp_site)):
            y = sublayer(h)
            if len(streams) < n:
                streams = [*streams, y]
            else:
                scores = torch.stack([score(s, site.gate_weight) for s in streams], -1)
                scores = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1) + site.gate_bias
                beta = torch.softmax(scores, -1)[..., 1:]
                streams = [s + beta[..., i, None] * (y - s) for i, s in enumerate(streams)]
            h = pool(streams, site.pool_weight)
    expected = model.lm_head(base.norm(h))
    found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "phi"])
def test_saved_and_loaded(family, tmp_path):
    model = moved(adapt(config_of(family), "hc", n_streams=2, norm="rms")).eval()
    ids = tokens()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    for read in (
        transformers.AutoModelForCausalLM.from_pretrained,
        huggingface.load,
        type(model).from_pretrained,
    ):
        again = read(tmp_path)
        assert type(again) is type(model) and not again.training
        assert torch.equal(again(input_ids=ids).logits, expected)
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_without_depthmix_it_is_refused_and_not_half_loaded(tmp_path):
    adapt(config_of(), "mgr-competitive").save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and "depthmix-llama" in ran.stderr


def test_one_import_is_enough(tmp_path):
    model = moved(adapt(config_of("qwen3"), "mgr-competitive", n_streams=2)).eval()
    model.save_pretrained(tmp_path)
    code = (
        f"import depthmix.hf, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"print(model(input_ids=torch.tensor({tokens().tolist()})).logits.double().sum().item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == model(input_ids=tokens()).logits.double().sum().item()


def test_the_start_of_a_new_model_is_that_of_transformers():
    """The same draws as without a connection, which starts as its own equations say."""
    torch.manual_seed(5)
    plain = transformers.AutoModelForCausalLM.from_config(config_of())
    torch.manual_seed(5)
    mixed = adapt(config_of(), "mgr-competitive", n_streams=3)
    ours = dict(mixed.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(ours.pop(name), p)
    assert all("_site." in name for name in ours)
    bias = depthmix.gate_bias_init(2 * LAYERS - 2, 3)
    assert ours["model.layers.2.mlp_site.gate_bias"].tolist() == pytest.approx([bias, 0, 0, 0])
    # A configuration that was given is not changed.
    config = config_of()
    adapt(config, "mgr-competitive")
    assert config.model_type == "llama" and "depthmix" not in config.to_dict()


def test_weights_that_a_folder_lacks_start_as_the_equations_say(tmp_path):
    """A plain model's weights under an adapted configuration."""
    build().save_pretrained(tmp_path)
    mixed = adapt(config_of(), "mgr-competitive", n_streams=3)
    kept = json.loads((tmp_path / "config.json").read_text())
    changes = {"model_type": "depthmix-llama", "depthmix": mixed.config.depthmix, "architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(kept | changes))
    again = huggingface.load(tmp_path)
    fresh = dict(mixed.named_parameters())
    for name, p in again.named_parameters():
        if "_site." in name:
            assert torch.equal(p, fresh[name]), name


@pytest.mark.parametrize(
    "residual", ["mgr-competitive", "mgr-competitive:stream_memory=inversion", "hc", "attnres"]
)
def test_gradient_checkpointing_gives_the_same_gradients(residual):
    model = moved(adapt(build(), residual, n_streams=2)).train()
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable()
    # Inversion's anchors are chosen once more, from the same streams.
    for a, b in zip(gradients(), expected, strict=True):
        assert torch.equal(a, b)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant"):
        gradients()


def test_trainer_trains_saves_and_resumes_to_the_same_weights(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8).tolist()]

    def run(steps, folder, resume=False):
        torch.manual_seed(0)
        model = adapt(config_of(), "mgr-competitive", n_streams=3)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, report_to=[],
            learning_rate=1e-2, lr_scheduler_type="constant", gradient_checkpointing=True, use_cpu=True, seed=1,
            disable_tqdm=True,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(decay_groups(model, 0.1), 1e-2)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        losses = trainer.train(resume_from_checkpoint=resume)
        return model, losses.training_loss

    whole, loss = run(4, tmp_path / "whole")
    assert loss < math.log(V) * 1.2
    run(2, tmp_path / "cut")
    resumed, _ = run(4, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    start = adapt(config_of(), "mgr-competitive", n_streams=3)
    moved_away = [
        n
        for (n, a), b in zip(whole.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert any("gate_weight" in name for name in moved_away)


def test_optimiser_groups():
    model = adapt(build(), "hc", n_streams=2)
    groups = {kind: {name for name, _ in named} for kind, named in parameter_groups(model).items()}
    assert "model.layers.1.self_attn.q_proj.weight" in groups["muon"]
    assert "model.embed_tokens.weight" in groups["adamw"] and "lm_head.weight" in groups["adamw"]
    assert "model.layers.1.attn_site.following.projection" in groups["adamw"]
    assert "model.layers.1.attn_site.following.static" in groups["adamw_no_decay"]
    assert "model.layers.0.connection.first.static" in groups["adamw_no_decay"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    optimizer = build_optimizer(model, OptimConfig())
    ids = tokens()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "phi"])
@pytest.mark.parametrize("residual", CONTINUED)
def test_a_trained_model_goes_on_where_it_is(family, residual):
    """With the factors that a connection needs, the logits are the model's to rounding."""
    model = build(family)
    # A drawn embedding is so small that PreNorm's own rounding shows; that of a trained model is not.
    ids = tokens()
    expected = model(input_ids=ids).logits
    mixed = adapt(model, residual, n_streams=2, start="prenorm-scaled")
    found = mixed(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


EXACT = {"prenorm": "", "denseformer": "", "hc": ":merge=mean", "hc-static": ":merge=mean", "mhc": ":merge=mean",
         "mhc-lite": ":merge=mean"}  # fmt: skip


@pytest.mark.parametrize("residual", CONTINUED)
def test_which_connections_contain_prenorm(residual):
    model = build()
    ids = tokens()
    expected = model(input_ids=ids).logits
    if residual not in EXACT:
        with pytest.raises(UserError, match="prenorm-scaled"):
            adapt(model, residual, n_streams=4, start="prenorm")
        assert torch.equal(model(input_ids=ids).logits, expected)  # and the model is as it was
        return
    mixed = adapt(model, residual + EXACT[residual], n_streams=4, start="prenorm")
    found = mixed(input_ids=ids).logits
    if residual in ("prenorm", "denseformer", "hc", "hc-static"):  # sums of four equal numbers are exact
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    # It is no dead end: the connection learns.
    mixed(input_ids=ids, labels=ids).loss.backward()
    sites = [p for n, p in mixed.named_parameters() if "_site." in n or ".connection." in n]
    assert residual == "prenorm" or any(p.grad.abs().max() > 0 for p in sites)


def test_a_start_is_kept_with_what_is_saved(tmp_path):
    model = adapt(build(), "mgr-competitive", n_streams=3, start="prenorm-scaled")
    ids = tokens()
    model.save_pretrained(tmp_path)
    assert torch.equal(huggingface.load(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_siamese_and_moda_say_why_not():
    with pytest.raises(UserError, match="post-norm"):
        adapt(build(), "siamese", start="prenorm-scaled")
    with pytest.raises(UserError, match=r"depthmix\.GPT"):
        adapt(build(), "moda")


def test_hidden_states_are_what_the_blocks_hand_on():
    model = moved(adapt(build(), "mgr-competitive", n_streams=2))
    ids = tokens()
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert [h.shape for h in out.hidden_states] == [(2, T, 32)] * (LAYERS + 1)
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = adapt(config_of(), "mgr-competitive", n_streams=2, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == dtype
    wide = copy.deepcopy(model).double()(input_ids=ids).logits
    assert (out.logits.double() - wide).abs().max() <= 0.05 * wide.abs().max()


def test_compiled_is_the_same():
    model = moved(adapt(build(), "mgr-competitive", n_streams=2))
    ids = tokens()
    expected = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_attention_implementations_agree():
    ids = tokens()
    eager = moved(adapt(build(), "mgr-competitive", n_streams=2))
    assert eager.config._attn_implementation == "sdpa"
    sdpa = eager(input_ids=ids).logits
    eager.set_attn_implementation("eager")
    assert eager.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(input_ids=ids).logits, sdpa, rtol=0, atol=1e-5 * sdpa.abs().max().item())


def test_beams_and_padding():
    """A prompt padded on the left continues as it does alone."""
    model = moved(adapt(build(), "mgr-independent", n_streams=2)).double()
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    both = torch.cat([padded, tokens(1, 9, seed=8)])
    mask = (both != 0).long()
    alone = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    together = model.generate(both, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(together[0, 9 : 9 + alone.shape[1] - 6], alone[0, 6:])


def test_static_cache():
    model = moved(adapt(build(), "mgr-competitive", n_streams=3))
    how = dict(attention_mask=torch.ones(2, 6), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    texts = [model.generate(tokens(2, 6), **how, **kind) for kind in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*texts)


def test_blocks_on_several_devices(tmp_path):
    """One of them on the disk: what goes from block to block passes the hooks of accelerate."""
    model = moved(adapt(build(), "mgr-competitive", n_streams=3))
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(LAYERS)}
    divided = huggingface.load(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    assert divided.model.layers[1].attn_site.pool_weight.is_meta
    assert torch.equal(divided(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_copied():
    model = moved(adapt(build(), "hc", n_streams=2))
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    other = moved(adapt(build(), "hc", n_streams=2))
    assert torch.equal(again(input_ids=tokens()).logits, other(input_ids=tokens()).logits)


def test_dropout_in_a_block_itself_is_refused():
    """Its output would be written without dropout."""
    with pytest.raises(UserError, match=r"in training.*set it to 0"):
        adapt(build("opt", dropout=0.5), "mgr-competitive", n_streams=2)
    # One module for both of its outputs.
    with pytest.raises(UserError, match=r"in training.*set it to 0"):
        adapt(build("phi", resid_pdrop=0.5), "mgr-competitive", n_streams=2)
    plain = build("gpt2", resid_pdrop=0.5)
    ids, logits = tokens(), []
    for model in (plain, adapt(copy.deepcopy(plain), "prenorm")):
        torch.manual_seed(3)
        logits.append(model.train()(input_ids=ids).logits)
    assert torch.equal(*logits)
    # A module behind each; three terms are added in another order.
    plain, logits = build("gpt-neox", hidden_dropout=0.5), []
    for model in (plain, adapt(copy.deepcopy(plain), "prenorm")):
        torch.manual_seed(3)
        logits.append(model.train()(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5 * logits[0].abs().max().item())


def test_requests_that_cannot_be_met(tmp_path):
    model = build()
    for wrong, message in (
        (dict(residual="mgr"), "Did you mean"),
        (dict(residual="hc", bias=1), "no option 'bias'"),
        (dict(start="Prenorm"), "unknown start"),
        (dict(n_streams=65), "n_streams"),
        (dict(dtype=torch.float16), "for a configuration"),
    ):
        with pytest.raises(UserError, match=message):
            adapt(model, **({"residual": "mgr-competitive"} | wrong))
    assert type(model) is transformers.LlamaForCausalLM
    with pytest.raises(UserError, match="no weights"):
        adapt(config_of(), "hc", start="prenorm")
    with pytest.raises(UserError, match="already"):
        adapt(adapt(build(), "hc"), "hc")
    with pytest.raises(UserError, match="no causal language model"):
        adapt(transformers.LlamaModel(config_of()), "hc")
    with pytest.raises(UserError, match="encoder"):
        adapt(build("gpt2", add_cross_attention=True), "hc")
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no model of depthmix\.adapt"):
        huggingface.load(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        huggingface.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [["forward", "mlp", None]]},
        {"parts": "abc"},
        {"residual": "no-such"},
        {"options": {"n_layer": 3}},
        {"options": [1]},
        {"n_streams": "4"},
        {"more": 1},
    ],
)
def test_a_configuration_from_anybody(tmp_path, change):
    adapt(config_of(), "mgr-competitive").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["depthmix"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError):
        huggingface.load(tmp_path)


@pytest.mark.skipif(
    "DEPTHMIX_SMOLLM2" not in os.environ, reason="DEPTHMIX_SMOLLM2: scripts/unpack_smollm2.py's folder"
)
@pytest.mark.parametrize(
    "residual, start", [("hc:merge=mean", "prenorm"), ("mgr-competitive", "prenorm-scaled")]
)
def test_a_model_that_others_trained(residual, start):
    folder = os.environ["DEPTHMIX_SMOLLM2"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(100, 164).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = adapt(model, residual, n_streams=4, start=start)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
