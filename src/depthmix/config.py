"""What a run is made of: frozen dataclasses that refuse impossible values when they are built.

Each field's docstring is also its ``--help`` text; units are in it. Presets
(:mod:`depthmix.presets`) are instances of these classes.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import UserError, suggest

StreamMemory = Literal["store", "inversion", "replay"]
Inversion = Literal["anchored", "paper"]
Precision = Literal["fp32", "autocast", "bf16"]
ScoreScale = Literal["paper", "unit"]
IndependentInit = Literal["paper", "sigmoid"]


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


class AttentionSizes:
    """What follows from ``d_model``, ``n_head`` and ``head_size`` of a configuration."""

    d_model: int
    n_head: int
    head_size: int | None

    @property
    def head_dim(self) -> int:
        """Features of one attention head: ``head_size``, or what ``d_model`` leaves for it."""
        return self.d_model // self.n_head if self.head_size is None else self.head_size

    @property
    def attention_width(self) -> int:
        """Features of all heads together, inside attention; ``d_model`` unless ``head_size`` is set."""
        return self.n_head * self.head_dim


@dataclass(frozen=True)
class GPTConfig(AttentionSizes):
    """The network: a GPT with RoPE, ReLU^2 MLP, RMSNorm and tied embeddings (paper, Appendix B)."""

    vocab_size: int
    """Rows of the embedding; token ids are 0 .. vocab_size - 1."""
    n_layer: int
    """Blocks. One block is two sublayers: attention and MLP."""
    d_model: int
    """Width D of the residual stream, in features."""
    n_head: int
    """Attention heads; without head_size, d_model / n_head must be an even whole number."""
    seq_len: int
    """Longest sequence, in tokens."""
    residual: str = "mgr-competitive"
    """Residual connection, with options where wanted: name or name:option=value:option=value.
    `depthmix info --list` names them all."""
    n_streams: int = 4
    """Parallel residual streams n; used by connections that have streams."""
    stream_memory: StreamMemory = "replay"
    """How the backward pass gets the streams: store keeps all of them; replay keeps anchors and
    recomputes the rest, bit-identical; inversion undoes the lerps, within a tolerance."""
    replay_window: int = 8
    """Sublayers per anchor with stream_memory = replay: more keep less and recompute more."""
    inversion: Inversion = "anchored"
    """With stream_memory = inversion: anchored keeps what the tolerance demands; paper keeps the rows with
    the largest gates alone, and its error has no bound."""
    inversion_top_p: float = 0.01
    """With stream_memory = inversion: share of the streams' rows kept by every sublayer, 0 to 1."""
    inversion_tolerance: float = 0.02
    """With stream_memory = inversion: largest relative error of a reconstructed row."""
    score_scale: ScoreScale = "paper"
    """Scale of gate and pool scores: paper is 1/sqrt(D), unit is 1."""
    independent_init: IndependentInit = "paper"
    """Bias of the independent gate: paper is Eq. 14 as printed, sigmoid is Eq. 14 with n = 1."""
    gate_base_depth: int = 21
    """Eq. 14: number of lerping sublayers for which gate_base_bias is right."""
    gate_base_bias: float = -3.0
    """Eq. 14: sigmoid bias of a gate at the base depth."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    head_size: int | None = None
    """Features of one attention head. Default: d_model / n_head. Set, it frees d_model from n_head:
    attention is then n_head * head_size wide inside."""
    residual_options: dict[str, Any] = field(default_factory=dict)
    """Options of the residual connection that are no fields here. Filled from a residual given with options."""

    def __post_init__(self) -> None:
        from .residuals import registry

        name, values = registry.parse_spec(self.residual)
        shared, own = registry.split_values(name, values)
        own = {**self.residual_options, **own}
        registry.make_options(name, own)
        for key, value in {**shared, "residual": name, "residual_options": own}.items():
            object.__setattr__(self, key, value)
        for name in (
            "vocab_size",
            "n_layer",
            "d_model",
            "n_head",
            "seq_len",
            "n_streams",
            "replay_window",
            "gate_base_depth",
        ):
            value = getattr(self, name)
            _need(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} must be a whole number of at least 1, got {value!r}",
            )
        if self.head_size is None:
            _need(
                self.d_model % self.n_head == 0 and (self.d_model // self.n_head) % 2 == 0,
                f"d_model / n_head must be an even whole number (RoPE turns pairs of features), "
                f"got {self.d_model} / {self.n_head}; choose n_head so that it divides d_model / 2, "
                f"or set head_size",
            )
        else:
            size: Any = self.head_size
            whole = isinstance(size, int) and not isinstance(size, bool)
            _need(
                whole and size >= 2 and size % 2 == 0,
                f"head_size must be an even whole number of at least 2 (RoPE turns pairs of features), "
                f"got {size!r}",
            )
        _need(self.n_streams <= 64, f"n_streams must be between 1 and 64, got {self.n_streams}")
        for name, choices in (
            ("stream_memory", get_args(StreamMemory)),
            ("inversion", get_args(Inversion)),
            ("score_scale", ("paper", "unit")),
            ("independent_init", ("paper", "sigmoid")),
        ):
            value = getattr(self, name)
            _need(value in choices, suggest(str(value), choices, name))
        _need(
            0 <= self.inversion_top_p <= 1,
            f"inversion_top_p must be between 0 and 1, got {self.inversion_top_p}",
        )
        _need(
            self.inversion_tolerance > 0,
            f"inversion_tolerance must be positive, got {self.inversion_tolerance}",
        )
        _need(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        _need(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")

    @property
    def n_sublayers(self) -> int:
        """L: attentions plus MLPs."""
        return 2 * self.n_layer

    @property
    def label(self) -> str:
        """The residual connection with its own options, as a spec that ``residual`` takes."""
        return residual_label(dataclasses.asdict(self))


def residual_label(model: dict[str, Any]) -> str:
    """The connection of a saved model configuration as a spec: its name and its own options.

    Fields that connections share (``n_streams``, say) are not part of it: the configuration shows them.
    """
    from .residuals.registry import format_spec

    return format_spec(model["residual"], model.get("residual_options") or {})


def folder_name(label: str) -> str:
    """``label`` as part of a file name: letters, digits, ``-``, ``_`` and ``.`` only.

    ``attnres-block:blocks=4`` becomes ``attnres-block_blocks-4``.
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", label.replace("=", "-"))


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    data: tuple[str, ...] = ()
    """Files, folders, globs of .txt .jsonl .parquet (plain, .gz, .xz, .zst), or a folder made by
    `depthmix data prepare`. Empty: the source text of Python's standard library."""
    tokenizer: str = "byte"
    """byte, gpt2, or bpe:N (trained on the data, N entries). Ignored for prepared data."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet."""
    val_fraction: float = 0.05
    """Share of documents held out for validation, 0 to 0.5."""
    test_fraction: float = 0.0
    """Share of documents held out for a last test, which training never reads: 0 (none) to 0.5."""
    cache_dir: str | None = None
    """Where shards are kept. Default: $DEPTHMIX_CACHE or ~/.cache/depthmix."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        check_held_out(self.val_fraction, self.test_fraction)


def check_held_out(val_fraction: float, test_fraction: float) -> None:
    """Raise ``UserError`` for shares of documents that cannot be held out."""
    _need(0 < val_fraction <= 0.5, f"val_fraction must be above 0 and at most 0.5, got {val_fraction}")
    _need(0 <= test_fraction <= 0.5, f"test_fraction must be from 0 to 0.5, got {test_fraction}")
    _need(
        val_fraction + test_fraction < 1,
        f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on",
    )


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the trunk's matrices, AdamW for everything else (paper, Appendix B)."""

    lr: float = 3e-3
    """Peak learning rate of AdamW: embeddings, norms, biases, gates, pooling vectors."""
    muon_lr: float = 1e-2
    """Peak learning rate of Muon: 2-D matrices of the trunk."""
    connection_lr: float = 1.0
    """Factor on AdamW's learning rate for what it steps of the residual connection: gates, pools, mixing matrices; 0
    leaves them as they begin."""
    weight_decay: float = 0.1
    """Decoupled weight decay of 2-D parameters; 1-D parameters have none."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    muon_momentum: float = 0.95
    """Muon: Nesterov momentum."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 200
    """Optimiser steps of linear warm-up."""
    min_lr_fraction: float = 0.1
    """Where the cosine ends, as a share of the peak."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr"):
            value = getattr(self, name)
            _need(value > 0 and math.isfinite(value), f"{name} must be positive, got {value}")
        factor = self.connection_lr
        _need(
            factor >= 0 and math.isfinite(factor), f"connection_lr must be 0 or more and finite, got {factor}"
        )
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            _need(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "muon_momentum"):
            _need(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        _need(
            0 <= self.min_lr_fraction <= 1,
            f"min_lr_fraction must be between 0 and 1, got {self.min_lr_fraction}",
        )

    def lr_fraction(self, step: int, steps: int) -> float:
        """Share of the peak learning rate used by optimiser step ``step`` (0-based) of ``steps``.

        Linear warm-up to 1 over ``warmup_steps``, then a cosine that reaches
        ``min_lr_fraction`` at the last step.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * cosine


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: GPTConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 20000
    """Optimiser steps."""
    batch_size: int = 512
    """Sequences per optimiser step."""
    micro_batch: int = 0
    """Sequences per forward pass; gradients accumulate up to batch_size. 0: the whole batch at once."""
    eval_interval: int = 250
    """Optimiser steps between evaluations; the last step is always evaluated. 0: only the last."""
    eval_tokens: int = 1_048_576
    """Validation tokens per evaluation (the first so many, always the same ones)."""
    checkpoint_interval: int = 1000
    """Optimiser steps between checkpoints; the last step and every new best are always saved. 0: only those."""
    keep_last: int = 2
    """Newest checkpoints kept, besides the best one."""
    record_depth: bool = True
    """Record gates, norms and gradients of every sublayer at each evaluation: depth.jsonl, TensorBoard, watch."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    precision: Precision = "fp32"
    """fp32; autocast: fp32 weights, matrix products in bf16; bf16: everything in bf16, fp32 master weights."""
    activation_checkpointing: bool = False
    """Keep what enters each block and run the block again in the backward pass: less memory, a third more work."""
    compile: bool = False
    """Compile the model with torch.compile."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""
    parallel: str = ""
    """Division of the work among the processes of torchrun: dp=2,fsdp=2,tp=2,pp=2, any that are wanted; with pp also
    schedule=gpipe, 1f1b or interleaved, and stages=N. Empty: dp over all processes."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "keep_last"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch", "eval_interval", "checkpoint_interval"):
            _need(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _need(self.eval_tokens >= 1, f"eval_tokens must be at least 1, got {self.eval_tokens}")
        micro = self.micro_batch or self.batch_size
        _need(
            self.batch_size % micro == 0,
            f"batch_size must be a multiple of micro_batch, got {self.batch_size} and {micro}",
        )
        _need(
            self.precision in ("fp32", "autocast", "bf16"),
            suggest(str(self.precision), ("fp32", "autocast", "bf16"), "precision"),
        )
        from .parallel.plan import ParallelPlan

        ParallelPlan.parse(self.parallel).check(self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.model.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :func:`from_dict` is the way back."""
        return dataclasses.asdict(self)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Build a :class:`TrainConfig` from :meth:`TrainConfig.to_dict` (a saved ``config.json``).

    Raises ``UserError`` for a key that no field has or a value that no field takes.
    """

    def build(cls: Any, values: Any, where: str) -> Any:
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            _need(key in known, f"{where}: " + suggest(str(key), known, "field"))
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{where}: {error}") from error

    values = dict(values)
    for key, cls in (("model", GPTConfig), ("data", DataConfig), ("optim", OptimConfig)):
        if key in values:
            values[key] = build(cls, values[key], f"config.{key}")
    return build(TrainConfig, values, "config")
