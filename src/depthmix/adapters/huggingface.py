"""Causal language models of transformers with another residual connection: Llama, Qwen, SmolLM2, GPT-2, Gemma, ...

One way for all, and nothing of it knows a model by name: their modules run their own code, and only how blocks are
joined is replaced (:mod:`depthmix.adapters.blocks`). A connection mixes over depth within one token, so the model's own
key-value cache is all that generation needs.

What is saved is a model type of its own, ``depthmix-llama`` for one: transformers without this module refuses it,
where it would otherwise load the blocks, drop the connection, and compute something else. ``AutoConfig`` and
``AutoModelForCausalLM`` know these types once this module is imported (those in ``FAMILIES``; :func:`load` any).
"""

import copy
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import anatomy
from ..anatomy import PROBE
from ..errors import UserError
from ..wrapping import Start
from . import INSTALL

try:
    import transformers
except ModuleNotFoundError as error:
    raise UserError(f"models of transformers need it installed: {INSTALL}") from error

from .blocks import MixedBlock, adapt_blocks, connection_modules, install

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "depthmix-"
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
    "gpt_neox",
    "phi",
)
"""Model types whose adapted form ``AutoModelForCausalLM`` loads after the import of this module."""


def adapt_language_model(
    model: Any,
    residual: str = "mgr-competitive",
    *,
    n_streams: int = 4,
    start: Start = "own",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> Any:
    """:func:`depthmix.adapt` for a causal language model of transformers, or the configuration of one.

    Args:
        dtype, attn_implementation: as transformers takes them, where ``model`` is a configuration.
    """
    if isinstance(model, transformers.PreTrainedConfig):
        if start != "own":
            raise UserError(
                f"start={start!r} continues a trained model, and a configuration has no weights; give the model"
            )
        given = {"dtype": dtype, "attn_implementation": attn_implementation}
        model = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(model), **{key: value for key, value in given.items() if value is not None}
        )
    elif dtype is not None or attn_implementation is not None:
        raise UserError(
            "dtype and attn_implementation are for a configuration; a model has them already. Use model.to(dtype) or "
            "model.set_attn_implementation(...)"
        )
    own: type = type(model)
    name = own.__name__
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(f"{name} is no model of transformers")
    config = model.config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UserError(f"{name} attends to an encoder; only decoders on their own can be adapted")
    if config.get_text_config() is not config:
        raise UserError(f"{name} is more than a language model; adapt its language model alone")
    if type(config).model_type not in transformers.CONFIG_MAPPING or _causal(type(config)) is not own:
        raise UserError(
            f"{name} is no causal language model (...ForCausalLM) as AutoModelForCausalLM makes them"
        )
    if any(p.is_meta for p in model.parameters()):
        raise UserError(
            f"{name} has weights on the meta device, and a run is needed to see what its blocks do"
        )

    vocabulary = model.get_input_embeddings().weight.shape[0]
    longest = getattr(config, "max_position_embeddings", None) or PROBE
    ids = torch.arange(2 * min(PROBE, longest)).view(2, -1) * 7919 % vocabulary

    def run():
        return model(input_ids=ids.to(model.device), use_cache=False).logits

    how: dict[str, Any] = {"n_streams": n_streams, "start": start, "options": options}
    parts = adapt_blocks(model, list(find_blocks(model)), run, config.hidden_size, residual, **how)

    changed = copy.deepcopy(config)
    changed.__class__ = register(type(config))
    distinct = sorted(set(parts), key=str)
    changed.depthmix = {
        "residual": residual,
        **how,
        "parts": [list(own) for own in (distinct if len(distinct) == 1 else parts)],
    }
    for module in model.modules():
        if module.__dict__.get("config") is config:
            module.config = changed
    model.__class__ = model_class(own)
    return model


def load(folder: str | Path, **keywords: Any) -> Any:
    """Read what ``save_pretrained`` of an adapted model wrote, of any family.

    Args:
        keywords: for ``from_pretrained``, ``dtype`` for one. Weights are read from safetensors alone.

    Raises:
        ValueError: the folder holds no adapted model.
    """
    path = Path(folder) / "config.json"
    try:
        kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no model: {path} cannot be read as a configuration") from error
    if not register_type(kind):
        raise UserError(
            f"{folder} holds a {kind!r}, no model of depthmix.adapt; load it with AutoModelForCausalLM and adapt it"
        )
    keywords = {"use_safetensors": True} | keywords
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **keywords)


def find_blocks(model: "PreTrainedModel") -> nn.ModuleList:
    """The list of blocks of a causal language model. Raises ``ValueError`` where there is none, or more than one."""

    def refusal(why: str) -> UserError:
        return UserError(f"{type(model).__name__} cannot be given another residual connection: its {why}")

    return anatomy.find_blocks(model.get_decoder(), model.config.num_hidden_layers, refusal)


class AdaptedConfig:
    """What is put in front of a configuration's own class: ``depthmix`` says how blocks are joined."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _register_model(type(self))


class AdaptedModel:
    """What is put in front of a model's own class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        blocks = find_blocks(self)
        how = _checked(config.depthmix, len(blocks))
        parts = how.pop("parts")
        for block, own in zip(blocks, parts, strict=True):
            for name in own:
                if name is not None and name not in block._modules:
                    raise UserError(f"config.depthmix: a {type(block).__name__} has no part {name!r}")
        install(blocks, parts, config.hidden_size, **how)

    def initialize_weights(self):
        """Called where weights are missing in what was loaded."""
        super().initialize_weights()
        if not any(isinstance(module, MixedBlock) for module in self.modules()):
            return
        for owner in connection_modules(find_blocks(self)):
            for module in owner.modules():
                own = list(module.parameters(recurse=False))
                if hasattr(module, "reset_parameters") and not any(
                    getattr(p, "_is_hf_initialized", False) for p in own
                ):
                    module.reset_parameters()


def _checked(payload: Any, length: int) -> dict[str, Any]:
    """``config.depthmix`` in the types that :func:`install` takes; it may come from anybody."""
    names = ("residual", "n_streams", "start", "options", "parts")
    if not isinstance(payload, dict) or set(payload) != set(names):
        raise UserError(
            f"config.depthmix must hold {', '.join(names)}, as depthmix.adapt writes it; got {payload!r}"
        )
    parts = payload["parts"]
    fits = isinstance(parts, list) and len(parts) in (1, length)
    if not fits or not all(
        isinstance(own, list | tuple)
        and len(own) == 3
        and all(isinstance(name, str) for name in own[:2])
        and isinstance(own[2], str | None)
        for own in parts
    ):
        raise UserError("config.depthmix: parts must be three names, for every block or for all")
    if not isinstance(payload["options"], dict) or not isinstance(payload["residual"], str):
        raise UserError("config.depthmix: residual must be a name and options a dict")
    parts = [tuple(own) for own in parts]
    return payload | {"parts": parts if len(parts) == length else parts * length}


@functools.cache
def config_class(base: "type[PreTrainedConfig]") -> "type[PreTrainedConfig]":
    """The configuration class of the adapted form of ``base``, ``LlamaConfig`` for one."""
    return type(
        f"Depthmix{base.__name__}",
        (AdaptedConfig, base),
        {
            "model_type": PREFIX + base.model_type,
            "depthmix": None,
            "__annotations__": {"depthmix": dict | None},
            "__module__": __name__,
        },
    )


@functools.cache
def model_class(base: "type[PreTrainedModel]") -> "type[PreTrainedModel]":
    """The model class of the adapted form of ``base``, ``LlamaForCausalLM`` for one."""
    return type(
        f"Depthmix{base.__name__}",
        (AdaptedModel, base),
        {"config_class": config_class(base.config_class), "__module__": __name__},
    )


def register(base: type) -> type:
    """Make the adapted form of the configuration class ``base`` known to transformers; returns its class."""
    found = config_class(base)
    transformers.AutoConfig.register(found.model_type, found, exist_ok=True)
    _register_model(found)
    return found


def register_type(kind: str) -> bool:
    """:func:`register` for the model type of a saved adapted model, ``depthmix-llama`` for one; whether it is one."""
    base = kind.removeprefix(PREFIX)
    if base == kind or base not in transformers.CONFIG_MAPPING:
        return False
    register(transformers.CONFIG_MAPPING[base])
    return True


def _register_model(config: type) -> None:
    _, base = config.__bases__
    transformers.AutoModelForCausalLM.register(config, model_class(_causal(base)), exist_ok=True)


def _causal(config: type) -> type | None:
    """The class of a causal language model with this configuration."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[config] if config in mapping else None


for _family in filter(transformers.CONFIG_MAPPING.__contains__, FAMILIES):
    # The models themselves are imported when one is made.
    _config = config_class(transformers.CONFIG_MAPPING[_family])
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
