"""Sampling: the cache changes nothing, filters keep what they say, the same seed gives the same text."""

import pytest
import torch

from depthmix import GPT, GPTConfig
from depthmix.errors import UserError
from depthmix.generation import filter_logits, generate
from depthmix.model import KVCache


@pytest.fixture(scope="module", params=["prenorm", "mgr-independent", "mgr-competitive"])
def model(request):
    # Double precision: near ties must not decide between cached and uncached arithmetic.
    return GPT(GPTConfig(50, 4, 32, 2, 40, residual=request.param), seed=0).double()


def tokens(*args, **kwargs):
    return torch.stack(list(generate(*args, **kwargs)), 1)


@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(seed=1), dict(seed=2, top_k=5, top_p=0.8, temperature=1.7)]
)
def test_cache_changes_nothing(model, options):
    ids = torch.randint(0, 50, (3, 7))
    cached = tokens(model, ids, 34, **options)
    assert cached.shape == (3, 34)
    assert torch.equal(cached, tokens(model, ids, 34, use_cache=False, **options))


def test_greedy_is_the_argmax_of_the_whole_prefix(model):
    ids = torch.randint(0, 50, (2, 5))
    new = tokens(model, ids, 10, temperature=0)
    whole = torch.cat([ids, new], 1)
    with torch.no_grad():
        for t in range(10):
            assert torch.equal(model(whole[:, : 5 + t])[:, -1].argmax(-1), new[:, t])


def test_seed_and_padding_rows(model):
    ids = torch.randint(0, 30, (2, 5))
    assert torch.equal(tokens(model, ids, 20, seed=7), tokens(model, ids, 20, seed=7))
    assert not torch.equal(tokens(model, ids, 20, seed=7), tokens(model, ids, 20, seed=8))
    assert tokens(model, ids, 30, seed=7, vocab_size=30).max() < 30


def test_end_token_stops(model):
    ids = torch.randint(0, 50, (2, 5))
    free = tokens(model, ids, 30, seed=3)
    end = free[0, 4].item()
    stopped = tokens(model, ids, 30, seed=3, end_token=end)
    first = (free[0] == end).nonzero()[0].item()
    assert (stopped[0, first:] == end).all() and torch.equal(stopped[0, :first], free[0, :first])


def test_filters_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]))
    kept = lambda *args: torch.isfinite(filter_logits(logits, 1.0, *args)).tolist()  # noqa: E731
    assert kept(None, None) == [[True] * 4] * 2
    assert kept(2, None) == [[True, True, False, False], [False, False, True, True]]
    # The smallest set that reaches p: .5 alone reaches .5; .4 + .3 reaches .5.
    assert kept(None, 0.5) == [[True, False, False, False], [False, False, True, True]]
    assert kept(None, 0.51) == [[True, True, False, False], [False, False, True, True]]
    assert kept(None, 1e-9) == [[True, False, False, False], [False, False, False, True]]
    torch.testing.assert_close(filter_logits(logits, 2.0, None, None), logits / 2)
    # Equal logits: exactly k stay.
    assert torch.isfinite(filter_logits(torch.zeros(1, 9), 1.0, 3, None)).sum() == 3


def test_sampling_follows_the_distribution(model):
    ids = torch.randint(0, 50, (1, 5)).expand(4000, 5)
    drawn = next(generate(model, ids, 1, seed=0, temperature=3.0))
    with torch.no_grad():
        p = (model(ids[:1])[0, -1].float() / 3).softmax(-1)
    counts = torch.bincount(drawn, minlength=50)
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p)).sum().item()
    assert chi2 < 95  # 49 degrees of freedom: exceeded once in 10,000 draws; the seed is fixed


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(temperature=-1.0), "temperature must not be negative"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(max_new_tokens=100), "prompt of 5 tokens and 100 new ones do not fit .* at most 36 tokens"),
    ],
)
def test_bad_options_are_named_at_the_call(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.zeros(1, 5, dtype=torch.long), **(dict(max_new_tokens=3) | options))


def test_one_graph_serves_all_tokens(model):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    prompts = [torch.randint(0, 50, (length,)) for length in (9, 1, 4)]
    counter = CompileCounter()
    found = tokens(model, prompts, 32, temperature=0, compile=counter)  # to the last place of the context
    assert torch.equal(found, tokens(model, prompts, 32, temperature=0))
    assert counter.frame_count == 1
    one = tokens(model, prompts[0][None], 32, temperature=0, compile="eager")
    assert torch.equal(one[0], found[0])
    with pytest.raises(ValueError, match="compile is for tokens read from a cache"):
        generate(model, prompts, 3, use_cache=False, compile="eager")


def test_no_graph_goes_beyond_the_context(model):
    def backend(graph, examples):
        raise AssertionError("compiled")

    prompts = [torch.randint(0, 50, (length,)) for length in (9, 1)]
    with pytest.raises(
        UserError, match="prompt of 9 tokens and 33 new ones do not fit the model's context of 40"
    ):
        generate(model, prompts, 33, compile=backend)
    KVCache.empty(model.config, 1, 41)  # its length is known, and refused when it comes to that
    with pytest.raises(UserError, match="room for 41 tokens does not fit the model's context of 40"):
        KVCache.empty(model.config, 1, 41, fixed=True)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0, use_cache=False)])
def test_unequal_prompts_are_each_alone(model, options):
    prompts = [torch.randint(0, 50, (length,)) for length in (9, 1, 4)]
    together = tokens(model, prompts, 20, **options)
    for prompt, found in zip(prompts, together, strict=True):
        assert torch.equal(found, tokens(model, prompt[None], 20, **options)[0])
    assert torch.equal(tokens(model, prompts[:1] * 2, 5, **options)[0], together[0, :5])
    with pytest.raises(ValueError, match="prompts must be one or more"):
        generate(model, [prompts[0], prompts[0][:0]], 3)
    with pytest.raises(ValueError, match="do not fit the model's context"):
        generate(model, prompts, 33)
