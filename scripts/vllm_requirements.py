"""Whether an exported folder meets what vLLM asks of a model for its Transformers modeling backend.

    python scripts/vllm_requirements.py exported

Needs neither a GPU nor vLLM. The requirements are those of vLLM's documentation ("Writing custom models"), each
checked by running the model:

auto_map     ``config.json`` is there and names the code of AutoConfig and AutoModel
backend      the base model says that attention can be replaced (``_supports_attention_backend``)
attention    with a registered attention function in place of torch's, every layer calls it once, with the keyword
             arguments that were given to the model, and nothing else attends
flat batch   sequences of different lengths laid end to end in one row, told apart by ``position_ids`` alone and
             attended to apart by that function, give each sequence's own hidden states: how vLLM batches
no cache     the model runs with ``use_cache=False`` and no mask: keys and values are vLLM's to keep
tensor plan  the plan of the configuration names linear layers, by "colwise" or "rowwise"; a block's attention and MLP,
             cut in two by it, sum up to what they were
meta         the base model can be made on the meta device

Prints one line for each and ends with status 1 if one is not met.
"""

import argparse
import copy
import fnmatch
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTHS = (5, 1, 9)


class Recorder:
    """Attention over sequences that lie end to end; notes who calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **keywords):
        self.calls.append((module.layer_idx, keywords.get("attention_instances"), attention_mask))
        out = [
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            for q, k, v in zip(*(x.split(LENGTHS, 2) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(out, 2).transpose(1, 2), None


def check(folder: Path):
    """Yield ``(requirement, whether it is met, what was found)``."""
    config_file = folder / "config.json"
    auto_map = json.loads(config_file.read_text()).get("auto_map", {}) if config_file.exists() else {}
    yield (
        "auto_map",
        {"AutoConfig", "AutoModel"} <= auto_map.keys(),
        f"names {', '.join(auto_map) or 'nothing'}",
    )
    if not auto_map:
        return
    trusted = {"trust_remote_code": True}
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **trusted).eval()
    yield (
        "backend",
        bool(model._supports_attention_backend) and model.is_backend_compatible(),
        type(model).__name__,
    )

    ids = torch.randint(0, 256, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model(one, use_cache=False).last_hidden_state for one in ids.split(LENGTHS, 1)], 1)
    recorder, token = Recorder(), object()
    ALL_ATTENTION_FUNCTIONS.register("check", recorder)
    model.config._attn_implementation = "check"
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    try:
        with torch.no_grad():
            flat = model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                attention_instances=token,
                return_dict=False,
            )[0]
    except ValueError as error:
        yield "attention", False, str(error)
        return
    layers = [layer for layer, *_ in recorder.calls]
    given = all(found is token for _, found, _ in recorder.calls)
    expected = list(range(model.config.num_hidden_layers))
    yield (
        "attention",
        layers == expected and given,
        f"called by layers {layers}, keywords {'' if given else 'not '}given",
    )
    off = (flat - alone).abs().max().item()
    yield "flat batch", off <= 1e-5 * max(1.0, alone.abs().max().item()), f"hidden states differ by {off:.1e}"
    masks = [mask for *_, mask in recorder.calls if mask is not None]
    yield "no cache", not masks, f"{len(masks)} masks made"
    yield "tensor plan", *tensor_plan(model)
    with torch.device("meta"):
        empty = AutoModel.from_config(AutoConfig.from_pretrained(folder, **trusted), **trusted)
    on_meta = all(p.is_meta for p in empty.parameters())
    yield (
        "meta",
        on_meta and set(empty.state_dict()) == set(model.state_dict()),
        f"{len(empty.state_dict())} tensors",
    )


def tensor_plan(model) -> tuple[bool, str]:
    plan = model.config.base_model_tp_plan or {}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    style = {name: kind for pattern, kind in plan.items() for name in fnmatch.filter(linear, pattern)}
    if not style or set(style.values()) - {"colwise", "rowwise"}:
        return False, "no plan"
    block = model.blocks[0]
    model.config._attn_implementation = "sdpa"
    x = torch.randn(2, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = [x.flatten()[0] * 0 + y for y in sublayers(model, block, x)]
    halves = []
    for part in range(2):
        cut = copy.deepcopy(block)
        for name, module in cut.named_modules():
            kind = style.get(f"blocks.0.{name}")
            if kind is not None:
                dimension = 0 if kind == "colwise" else 1
                module.weight = nn.Parameter(module.weight.chunk(2, dimension)[part])
        halves.append(sublayers(model, cut, x))
    off = max((a + b - y).abs().max().item() for y, a, b in zip(whole, *halves, strict=True))
    largest = max(y.abs().max().item() for y in whole)
    return off <= 1e-5 * max(1.0, largest), f"{len(style)} linear layers, halves sum up to {off:.1e}"


@torch.no_grad()
def sublayers(model, block, x):
    """Outputs of a block's attention and of its MLP, of the same input."""
    seen = []
    handles = [
        module.register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for module in (block.attn, block.mlp)
    ]
    kept, model.blocks = model.blocks, nn.ModuleList([Only(block, x)])
    try:
        model(inputs_embeds=x, use_cache=False)
    finally:
        model.blocks = kept
        for handle in handles:
            handle.remove()
    return seen


class Only(nn.Module):
    """Runs a block's two sublayers on the same input and leaves what is around them alone."""

    gradient_checkpointing = False

    def __init__(self, block, x):
        super().__init__()
        self.block, self.attn, self.x = block, block.attn, x
        self.attn_site, self.mlp_site = block.attn_site, block.mlp_site

    def forward(self, h, state, cos, sin, call, layer, **_):
        self.block.attn(self.x, cos, sin, call, layer)
        self.block.mlp(self.x)
        return h, state


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="written by depthmix export --to hf --standalone")
    folder = parser.parse_args().folder
    met = True
    for requirement, good, found in check(folder):
        met &= good
        print(f"{requirement:<12} {'met' if good else 'NOT MET':<8} {found}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
