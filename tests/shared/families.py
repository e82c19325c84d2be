"""Small models of transformers, one of each family that tests of other folders look at or adapt."""

import tokenizers
import torch
import transformers

V, LAYERS = 97, 3
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
GPT2 = dict(
    vocab_size=V,
    n_embd=32,
    n_layer=LAYERS,
    n_head=4,
    n_positions=64,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
WINDOW = dict(sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"])
FAMILIES = {
    "llama": ("Llama", LLAMA),
    "smollm2": ("Llama", dict(LLAMA, tie_word_embeddings=True, num_key_value_heads=1)),
    # Blocks that are called with masks of their own.
    "qwen2": ("Qwen2", dict(LLAMA, use_sliding_window=True, **WINDOW)),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=8)),
    "gpt2": ("GPT2", GPT2),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=4)),
    "gemma": ("Gemma", dict(LLAMA, head_dim=8)),
    # Norms behind the sublayers, capped logits.
    "gemma2": ("Gemma2", dict(LLAMA, head_dim=8, final_logit_softcapping=0.3, **WINDOW)),
    "gemma3": ("Gemma3Text", dict(LLAMA, head_dim=8, **WINDOW)),
    # No norm before the MLP.
    "olmo2": ("Olmo2", LLAMA),
    # The MLP is two children of the block, and runs on [B * T, D].
    "opt": ("OPT", dict(LLAMA, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
    # The decoder returns more than its hidden state.
    "mixtral": ("Mixtral", dict(LLAMA, num_local_experts=4)),
    "gpt-neox": ("GPTNeoX", LLAMA),
    "gpt-neox-sequential": ("GPTNeoX", dict(LLAMA, use_parallel_residual=False)),
    "phi": ("Phi", LLAMA),
    # Scaled logits.
    "cohere": ("Cohere", dict(LLAMA, logit_scale=0.3)),
    # Blocks return tuples.
    "gptj": ("GPTJ", dict(GPT2, rotary_dim=4)),
}
PARALLEL = {"gpt-neox", "phi", "cohere", "gptj"}
"""Those whose attention and MLP read the same."""
TEXT = "The whale is the whale, and the sea is the sea; call it whatever you like.\n"


def config_of(family="llama", **changes):
    kind, options = FAMILIES[family]
    return getattr(transformers, kind + "Config")(**(options | changes))


def build(family="llama", seed=0, size=8.0, **changes):
    """As from_config draws them, sublayers write next to nothing: their matrices are made larger."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(size)
    return model.eval()


def build_tokenizer(**special):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<end>", "<start>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "<>"], trainer)
    if "bos_token" in special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<start> $A", special_tokens=[("<start>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def moved(model, seed=1, size=0.2):
    """The same adapted model with every parameter of its connection away from where it starts."""
    from depthmix.adapters import huggingface

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in huggingface.connection_modules(huggingface.find_blocks(model)):
            for p in owner.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * size)
    return model
