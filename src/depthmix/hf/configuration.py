"""The configuration of a depthmix model as transformers keeps it: the fields of ``GPTConfig`` beside its own."""

from typing import Any

from transformers import PreTrainedConfig

from ..config import AttentionSizes, GPTConfig
from ..exchange.fields import FIELDS, LIMITS, make_config


class DepthmixConfig(AttentionSizes, PreTrainedConfig):
    """``config.json`` of an exported model. Every field of :class:`depthmix.GPTConfig` is an attribute here.

    ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and ``max_position_embeddings`` are other names of
    ``d_model``, ``n_layer``, ``n_head`` and ``seq_len``.

    Raises:
        ValueError: a value that no model can have, or a size beyond ``LIMITS``.
    """

    model_type = "depthmix"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "seq_len",
    }
    # Rows of qkv lie head by head: a split by rows is a split by heads.
    base_model_tp_plan = {  # noqa: RUF012
        "blocks.*.attn.qkv": "colwise",
        "blocks.*.attn.proj": "rowwise",
        "blocks.*.mlp.fc": "colwise",
        "blocks.*.mlp.proj": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 320,
        n_layer: int = 16,
        d_model: int = 64,
        n_head: int = 2,
        seq_len: int = 256,
        residual: str = "mgr-competitive",
        n_streams: int = 4,
        stream_memory: str = "replay",
        replay_window: int = 8,
        inversion: str = "anchored",
        inversion_top_p: float = 0.01,
        inversion_tolerance: float = 0.02,
        score_scale: str = "paper",
        independent_init: str = "paper",
        gate_base_depth: int = 21,
        gate_base_bias: float = -3.0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        head_size: int | None = None,
        residual_options: dict[str, Any] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        for name, most in LIMITS.items():
            if isinstance(value := locals()[name], int) and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.d_model = d_model
        self.n_head = n_head
        self.seq_len = seq_len
        self.residual = residual
        self.n_streams = n_streams
        self.stream_memory = stream_memory
        self.replay_window = replay_window
        self.inversion = inversion
        self.inversion_top_p = inversion_top_p
        self.inversion_tolerance = inversion_tolerance
        self.score_scale = score_scale
        self.independent_init = independent_init
        self.gate_base_depth = gate_base_depth
        self.gate_base_bias = gate_base_bias
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.head_size = head_size
        self.residual_options = dict(residual_options or {})
        made = self.gpt  # refuses what cannot be, and takes a residual apart that was given with options
        for name in FIELDS:
            setattr(self, name, getattr(made, name))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def gpt(self) -> GPTConfig:
        """The :class:`depthmix.GPTConfig` of the model."""
        return make_config(self)

    @property
    def num_key_value_heads(self) -> int:
        """Every head has its own keys and values."""
        return self.n_head

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""
        return 4 * self.d_model
