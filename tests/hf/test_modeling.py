"""An exported model in transformers is the run's model: logits, caches, padding, generation, training."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import depthmix.hf
from depthmix import GPT, available_residuals
from depthmix.checkpoint import load_model
from depthmix.errors import UserError
from depthmix.generation import generate

pytestmark = pytest.mark.hf
transformers.utils.logging.set_verbosity_error()

every = pytest.mark.parametrize("residual", available_residuals())


@pytest.fixture
def pair(exported):
    """``pair(residual) -> (the run's model, transformers' model)`` in fp64, so that rounding explains nothing."""

    def get(residual, **options):
        run, folder = exported(residual, **options)
        ours, _ = load_model(run)
        return ours.double(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    return get


def ids(batch=3, tokens=20, seed=0):
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


@every
@torch.no_grad()
def test_logits_are_the_runs(pair, exported, residual):
    ours, theirs = pair(residual)
    same(theirs(ids()).logits, ours(ids()))
    run, folder = exported(residual)
    fp32, _ = load_model(run)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is depthmix.hf.DepthmixForCausalLM and model.dtype == torch.float32
    same(model(ids()).logits, fp32(ids()), 1e-5)


@every
@torch.no_grad()
def test_cache_is_no_cache(pair, residual):
    _, model = pair(residual)
    whole = model(ids(), use_cache=False)
    assert whole.past_key_values is None
    for cache in None, StaticCache(model.config, max_cache_len=20):
        logits = []
        for part in ids().split([7, 6, 1, 1, 5], 1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        same(torch.cat(logits, 1), whole.logits)


@every
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_is_unpadded(pair, residual, attention):
    """On the left and in the middle, with and without a cache."""
    _, model = pair(residual)
    model.set_attn_implementation(attention)
    lengths, text = (20, 13, 1), ids()
    mask = torch.stack([torch.arange(20) >= 20 - length for length in lengths]).long()
    mask[1, 10] = 0
    padded = model(text, attention_mask=mask).logits
    prompt = model(text[:, :15], attention_mask=mask[:, :15])
    behind = model(text[:, 15:], attention_mask=mask, past_key_values=prompt.past_key_values).logits
    for row, (one, keep) in enumerate(zip(text, mask.bool(), strict=True)):
        alone = model(one[keep][None]).logits[0]
        same(padded[row, keep], alone)
        same(behind[row, keep[15:]], alone[-int(keep[15:].sum()) :])


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_the_runs(pair, residual, attention):
    ours, theirs = pair(residual)
    theirs.set_attn_implementation(attention)
    text = ids()
    _, loss = ours(text[:, :-1], targets=text[:, 1:])
    loss.backward()
    expected = {name: p.grad for name, p in ours.named_parameters()}
    for checkpointing in False, True:
        theirs.zero_grad()
        if checkpointing:
            theirs.train().activation_checkpointing_enable()
        out = theirs(text, labels=text)
        same(out.loss.double(), loss, 1e-6)  # transformers computes it in fp32
        torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
        assert (out.past_key_values is None) == checkpointing
        for name, parameter in theirs.model.named_parameters():
            same(parameter.grad, expected[name], 1e-9)


def test_checkpointing_keeps_less(pair):
    _, model = pair("mgr-competitive")

    def kept():
        seen = {}

        def pack(x):
            seen[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.train()(ids(), use_cache=False)
        return sum(seen.values())

    before = kept()
    model.activation_checkpointing_enable()
    assert kept() < before / 2


@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "moda", "attnres", "hc"])
def test_greedy_is_the_runs(pair, residual):
    """A batch of unequal prompts, by both generators, with every kind of cache."""
    ours, model = pair(residual)
    prompts = [ids(1, n, seed=n)[0] for n in (9, 4, 1)]
    expected = torch.stack(list(generate(ours, prompts, 12, temperature=0, vocab_size=257)), 1)
    mask = torch.stack([torch.arange(9) >= 9 - len(prompt) for prompt in prompts]).long()
    text = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0), value=256) for p in prompts])
    for options in {}, {"use_cache": False}, {"cache_implementation": "static"}:
        found = model.generate(
            text, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
        )
        assert torch.equal(found[:, 9:], expected), options


def test_sampling_and_beams(pair):
    _, model = pair("mgr-independent")
    text = ids(2, 6)
    sampled = []
    for cache in True, False:
        torch.manual_seed(3)
        sampled.append(model.generate(text, max_new_tokens=20, do_sample=True, top_p=0.9, use_cache=cache))
    assert torch.equal(*sampled) and sampled[0].max() <= 256  # rows of the embedding that no text has
    found = [
        model.generate(
            text, max_new_tokens=10, num_beams=4, do_sample=False, use_cache=cache, eos_token_id=None
        )
        for cache in (True, False)
    ]
    assert torch.equal(*found)
    assert torch.equal(found[0], torch.stack([beam_search(model, prompt, 10, 4) for prompt in text]))


@torch.no_grad()
def beam_search(model, prompt, tokens, width):
    """The likeliest of ``width`` continuations, by its definition."""
    texts, scores = prompt[None], torch.zeros(1, dtype=torch.float64)
    for _ in range(tokens):
        after = scores[:, None] + model(texts).logits[:, -1].log_softmax(-1)[:, :257]
        scores, place = after.flatten().topk(width)
        texts = torch.cat([texts[place // 257], place[:, None] % 257], 1)
    return texts[0]


def test_the_context_is_never_exceeded_silently(exported, pair):
    _, model = pair("prenorm")
    _, folder = exported("prenorm")
    with pytest.raises(UserError, match="49 tokens do not fit the model's context of 48"):
        model(ids(1, 49))
    with pytest.raises(UserError, match="a prompt of 40 tokens and 10 new ones do not fit"):
        model.generate(ids(1, 40), max_new_tokens=10)
    assert model.generate(ids(1, 40), max_new_tokens=9, eos_token_id=None).shape == (1, 49)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("x" * 100)["input_ids"]) == 100  # not cut unless asked
    assert len(tokenizer("x" * 100, truncation=True)["input_ids"]) == 48
    # Padding does not count.
    mask = torch.zeros(1, 60, dtype=torch.long)
    mask[:, 20:] = 1
    same(model(ids(1, 60), attention_mask=mask).logits[:, 20:], model(ids(1, 60)[:, 20:]).logits)


@torch.no_grad()
def test_hidden_states_and_attentions(pair):
    _, model = pair("mgr-competitive")
    model.set_attn_implementation("eager")
    plain = model(ids())
    out = model(ids(), output_hidden_states=True, output_attentions=True)
    same(out.logits, plain.logits)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    same(out.hidden_states[0], model.model.embed(ids()))
    same(out.attentions[2].sum(-1), torch.ones(3, 2, 20, dtype=torch.float64))
    logits, *_ = model(ids(), return_dict=False)
    same(logits, plain.logits)


@torch.no_grad()
def test_embeddings_and_kept_logits(pair):
    _, model = pair("hc")
    whole = model(ids()).logits
    same(model(inputs_embeds=model.get_input_embeddings()(ids())).logits, whole)
    same(model(ids(), logits_to_keep=2).logits, whole[:, -2:])
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        model()


def test_bf16_device_map_compile_and_saving(exported, tmp_path):
    run, folder = exported("mgr-competitive")
    reference, _ = load_model(run)
    expected = reference(ids()).detach()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    similarity = torch.nn.functional.cosine_similarity(half(ids()).logits.float(), expected, -1)
    assert similarity.min() > 0.995
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    same(model(ids()).logits, expected, 1e-5)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(compiled(ids()).logits, expected, 1e-5)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": again.config._name_or_path}


@torch.no_grad()
@pytest.mark.parametrize("residual", ["prenorm", "mgr-competitive", "moda", "attnres", "denseformer", "hc"])
def test_blocks_on_disk(exported, residual, tmp_path):
    """``device_map`` puts blocks in places of their own."""
    run, folder = exported(residual)
    where = {"model.embed": "cpu", "model.residual": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {f"model.blocks.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path)
    if residual == "hc":  # its coefficients are a module inside of each site
        with pytest.raises(UserError, match="cannot have; give it a device that computes"):
            model(ids())
        return
    reference, _ = load_model(run)
    same(model(ids()).logits, reference(ids()), 1e-5)


def test_fresh_weights_are_those_of_a_gpt(exported):
    """Without a file: every parameter has the mean and deviation that GPT gives it."""
    _, folder = exported("mgr-competitive")
    config = transformers.AutoConfig.from_pretrained(folder)
    fresh, ours = AutoModelForCausalLM.from_config(config), GPT(config.gpt, seed=0)
    for name, expected in ours.named_parameters():
        found = fresh.model.get_parameter(name)
        if expected.numel() < 100 or expected.std() == 0:
            torch.testing.assert_close(found, expected)
        else:
            assert abs(found.std() / expected.std() - 1) < 0.1, name


def test_trainer(exported, tmp_path):
    _, folder = exported("mgr-competitive")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(f"{i} and {i + 1}", truncation=True) for i in range(16)]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, num_train_epochs=8, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, activation_checkpointing=True, save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=texts,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(tmp_path / "tuned")
    assert (tmp_path / "tuned/training_args.bin").exists()  # a pickle, which the way back does not open

    from depthmix.exchange.folder import import_folder

    tokenizer.save_pretrained(tmp_path / "tuned")
    import_folder(tmp_path / "tuned", tmp_path / "run")
    tuned, config = load_model(tmp_path / "run")
    assert config.data.tokenizer == "byte"
    with torch.no_grad():
        same(tuned(ids()), model.eval()(ids()).logits, 1e-5)


def test_a_graph_over_a_static_cache_does_not_go_beyond_the_context(exported):
    """A graph sees no positions: a cache with room behind the context is refused before there is one."""
    _, folder = exported("mgr-competitive")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 256, (1, 5))

    for forward in model, torch.compile(model, backend="eager"):
        with pytest.raises(UserError, match=r"room for 49 tokens does not fit the model's context of 48"):
            forward(ids, past_key_values=StaticCache(model.config, max_cache_len=49))
        with pytest.raises(UserError, match=r"50 tokens do not fit the model's context of 48"):
            forward(torch.randint(0, 256, (1, 50)), use_cache=False)
    with pytest.raises(
        UserError, match=r"prompt of 5 tokens and 45 new ones do not fit the model's context of 48"
    ):
        model.generate(ids, max_new_tokens=45, cache_implementation="static")
    text = model.generate(ids, max_new_tokens=44, min_new_tokens=44, cache_implementation="static")
    assert text.shape == (1, 49)
