"""A training step and a generated token, for whole models that take turns.

*Training step*: forward and backward of one micro-batch of random tokens, then clipping and the optimiser; where a
preset's batch is several micro-batches, its step is that many passes and one update. MFU is the model's matrix FLOPs
(:func:`depthmix.info.forward_flops`, three times) of a pass over its time, as a share of the peak that a large
matrix product reached in the same run. Peak memory is what the device held at most during a step, less what the
other models hold.

*Generated token*: one forward pass of one new token per sequence over a filled key-value cache.

**The check.** A short sequence through the model and through a float64 copy of it: gradients of all parameters (as
one vector) for training, logits for generation. The relative error may be twice that of the same model in the
same precision with torch operations only and all streams stored, plus 2^-20.
"""

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import GPTConfig, Precision, StreamMemory, TrainConfig
from ..errors import UserError
from ..info import describe, forward_flops
from ..model import GPT, KVCache
from ..optim import MuonAdamW, build_optimizer
from ..presets import preset
from ..train import build_model
from .machine import now
from .runner import quartiles, using

CHECK_TOKENS = 64
FLOOR = 2.0**-20
SEQUENCES = {"quick": 16, "xs": 1, "S": 1}
"""Sequences timed at once on a CPU; a preset's batch is a multiple of them."""


@dataclass
class Trainee:
    """A model in training and what its passes took."""

    config: TrainConfig
    model: GPT
    optimizer: MuonAdamW
    kernels: str | None = None
    """depthmix's backend; ``None`` leaves the choice as it is."""
    peak: int = 0
    """Bytes at most during a step, without the other models'."""

    def __post_init__(self):
        self.gradients: list[float] = []
        self.updates: list[float] = []
        self.forward = torch.compile(self.model) if self.config.compile else self.model


def trainee(config: TrainConfig, device: torch.device, kernels: str | None = None) -> Trainee:
    model = build_model(config, device)
    return Trainee(config, model, build_optimizer(model, config.optim), kernels)


def train_in_turns(
    trainees: list[Trainee], inputs: Tensor, targets: Tensor, rounds: int, passes: int, device: torch.device
) -> None:
    """Fill the trainees' times; one round warms up.

    Where a step is several passes only the first three rounds update: an update is timed by itself.
    """
    for round_ in range(-1, rounds):
        for each in trainees:
            if device.type == "cuda":
                others = torch.cuda.memory_allocated(device) - _held(each)
                torch.cuda.reset_peak_memory_stats(device)
            with using(each.kernels):
                began = now(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=each.config.precision == "autocast"):
                    loss = each.forward(inputs, targets)[1]
                loss.backward()
                done = now(device)
                if round_ >= 0:
                    each.gradients.append(done - began)
                if passes == 1 or round_ < 2:
                    each.optimizer.clip_grad_norm(1.0)
                    each.optimizer.step()
                    if round_ >= 0:
                        each.updates.append(now(device) - done)
                del loss
                if device.type == "cuda":
                    each.peak = max(each.peak, torch.cuda.max_memory_allocated(device) - others)
                each.optimizer.zero_grad()


def _held(each: Trainee) -> int:
    """Bytes of parameters, buffers and optimiser state."""
    tensors = [*each.model.parameters(), *each.model.buffers()]
    for found in _tensors(each.optimizer.state_dict()):
        tensors.append(found)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_cuda}
    return sum(storages.values())


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def random_batch(config: TrainConfig, sequences: int, device: torch.device) -> Tensor:
    """``inputs, targets``: ``[2, sequences, seq_len]`` random ids."""
    shape = (2, sequences, config.model.seq_len)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)


# --- the cases ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSettings:
    device: torch.device
    preset: str
    precision: Precision
    residuals: tuple[str, ...]
    stream_memory: tuple[StreamMemory, ...]
    kernels: tuple[str, ...]
    compile: bool
    rounds: int
    sequences: int | None
    peak_flops: float
    """Of a matrix product in the same run, a second."""
    n: tuple[int, ...] = ()
    """Streams of connections that have a choice and whose spec makes none; empty: the preset's number."""
    width: int | None = None
    layers: int | None = None
    """D and the blocks; ``None`` is the preset's."""

    def base(self) -> TrainConfig:
        """The preset, with these widths, blocks and precision."""
        config = preset(self.preset)
        model = resized(config.model, self.width, self.layers)
        return dataclasses.replace(config, model=model, precision=self.precision, compile=self.compile)

    def variants(self) -> list[tuple[str, TrainConfig, str]]:
        """``(label, configuration, kernels)`` of all models, PreNorm first."""
        base = self.base()
        found = []
        for residual in (spec for given in self.residuals for spec in _with_streams(given, self.n)):
            configs = [dataclasses.replace(base.model, residual=residual, residual_options={})]
            if "stream_memory" in _fields(residual):
                configs = [dataclasses.replace(configs[0], stream_memory=m) for m in self.stream_memory]
            for model in configs:
                label = residual
                if "stream_memory" in _fields(residual):
                    label += f", {model.stream_memory}"
                kernels = self.kernels if residual != "prenorm" else self.kernels[:1]
                for choice in kernels:
                    name = label if choice == "auto" or residual == "prenorm" else f"{label}, {choice}"
                    found.append((name, dataclasses.replace(base, model=model), choice))
        return found


def resized(model: GPTConfig, width: int | None, layers: int | None) -> GPTConfig:
    """The model with D = ``width`` in heads of the same size, and ``layers`` blocks; ``None`` leaves it.

    Raises ``UserError`` for a width that the heads do not divide.
    """
    if width is not None:
        size = model.head_dim
        if width % size:
            raise UserError(f"--width of models must be a multiple of their heads' {size}, got {width}")
        model = dataclasses.replace(model, d_model=width, n_head=width // size)
    return model if layers is None else dataclasses.replace(model, n_layer=layers)


def _with_streams(residual: str, n: tuple[int, ...]) -> list[str]:
    """The spec once for each number of streams, where it has a choice and does not make it itself."""
    from ..residuals import registry

    name, values = registry.parse_spec(residual)
    if "n_streams" not in _fields(residual) or "n_streams" in values or not n:
        return [registry.format_spec(name, values)]
    return [registry.format_spec(name, {"n_streams": k, **values}) for k in n]


def _fields(residual: str) -> tuple[str, ...]:
    from ..residuals import registry

    return registry.find(registry.parse_spec(residual)[0]).fields


@torch.no_grad()
def _perturb(model: GPT) -> None:
    """Away from the start, where gates and pools do not depend on what they read."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def _reference_model(model: GPT, config: TrainConfig, device: torch.device) -> GPT:
    """The same weights, all streams stored."""
    stored = dataclasses.replace(config.model, stream_memory="store")
    reference = build_model(dataclasses.replace(config, model=stored), device)
    reference.load_state_dict(model.state_dict())
    return reference


def _relative(found: Tensor, exact: Tensor) -> float:
    value = ((found.double() - exact).norm() / exact.norm()).item()
    return value if value == value else float("inf")


def _gradient(model: GPT, ids: Tensor, precision: str) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "autocast"):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    return torch.cat([g.flatten() for g in gradients])


def _judge(what: str, run, exact_run, reference_run, choice: str | None) -> dict:
    """``{"status", "reason", "error"}`` of what ``run`` returns, by the rule at the head of this file."""
    with using("torch"):
        exact, reference = exact_run(), reference_run()
    with using(choice):
        error = _relative(run(), exact)
    allowed = 2 * _relative(reference, exact) + FLOOR
    right = error <= allowed
    return {
        "status": "timed" if right else "wrong",
        "reason": None if right else f"{what}: error {error:.2e}, allowed {allowed:.2e}",
        "error": {"tensor": what, "value": error, "allowed": allowed},
    }


def _check_training(each: Trainee, device: torch.device) -> dict:
    ids = random_batch(each.config, 1, device)[0][:, : CHECK_TOKENS + 1]
    precision = each.config.precision
    exact = copy.deepcopy(each.model).double()
    return _judge(
        "gradient",
        lambda: _gradient(each.model, ids, precision),
        lambda: _gradient(exact, ids, "fp32"),
        lambda: _gradient(_reference_model(each.model, each.config, device), ids, precision),
        each.kernels,
    )


def _describe_failure(error: BaseException) -> dict:
    lines = str(error).strip().splitlines() or [""]
    return {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"[:300]}


def _row(label: str, config: TrainConfig) -> dict[str, Any]:
    """Of a model that nothing is known about yet."""
    row = {"candidate": label, "kind": "model", "version": None, "status": "waiting", "reason": None}
    row["residual"] = config.model.label
    for name in ("n_streams", "stream_memory"):
        if name in _fields(config.model.residual):
            row[name] = getattr(config.model, name)
    return row


def _shape(config: TrainConfig) -> dict[str, int]:
    return {"d_model": config.model.d_model, "n_layer": config.model.n_layer}


def training_step(
    settings: StepSettings, known: list[dict], keep: Callable[[dict], None] = lambda problem: None
) -> dict:
    """The record of the case: a row for every model, each of which takes turns with PreNorm alone.

    No more than two models are held, however many are asked for; and ``keep`` is given the record so far whenever a row
    is complete, ``known`` the rows of such a record, which are not measured again.
    """
    device = settings.device
    base = settings.base()
    sequences = settings.sequences or _sequences(settings.preset, device)
    passes = max(1, base.batch_size // sequences)
    inputs, targets = random_batch(base, sequences, device)
    rows = {row["candidate"]: row for row in known}
    wanted = settings.variants()
    counts = {"tokens": inputs.numel(), "tokens_per_step": base.tokens_per_step}
    problem = {**_shape(base), **counts}

    def turns(*trainees: Trainee, rounds: int) -> None:
        for each in trainees:
            each.gradients, each.updates = [], []
            each.optimizer.zero_grad()  # of turns that another model broke off
        train_in_turns([*trainees], inputs, targets, rounds, passes, device)

    def built(row: dict, config: TrainConfig, kernels: str) -> Trainee | None:
        """Checked and once through a step by itself; ``None`` where it is wrong."""
        each = trainee(config, device, kernels)
        _perturb(each.model)
        row |= _check_training(each, device)
        if row["status"] != "timed":
            return None
        turns(each, rounds=0)
        return each

    baseline: Trainee | None = None
    with recompiling(len(wanted) + 1):
        for label, config, kernels in wanted:
            if label in rows:
                continue
            if label != "prenorm" and baseline is None and rows["prenorm"]["status"] == "timed":
                baseline = built({}, *wanted[0][1:])
            row, each = _row(label, config), None
            try:
                each = built(row, config, kernels)
                if each is not None:
                    turns(*([] if baseline is None else [baseline]), each, rounds=settings.rounds)
                    figures = _step_figures(each, baseline, settings, passes, inputs.numel(), device)
                    row["modes"] = {"step": figures}
            except Exception as error:  # listed, and the others go on
                row |= _describe_failure(error)
            rows[label] = row
            if label == "prenorm" and row["status"] == "timed":
                baseline = each
            del each
            if device.type == "cuda":
                torch.cuda.empty_cache()
            problem["rows"] = [rows[name] for name, *_ in wanted if name in rows]
            keep(problem)
    return problem


@contextlib.contextmanager
def recompiling(models: int) -> Iterator[None]:
    """Room for the graphs of as many models in one process; beyond eight the compiler would leave them uncompiled."""
    import torch._dynamo.config as config

    with config.patch(recompile_limit=max(config.recompile_limit, models), fail_on_recompile_limit_hit=True):
        yield


def _sequences(name: str, device: torch.device) -> int:
    if device.type == "cuda":
        return preset(name).micro_batch or preset(name).batch_size
    return SEQUENCES.get(name, 1)


def _step_figures(each, baseline, settings, passes, tokens, device) -> dict:
    median = statistics.median(each.gradients)
    update = statistics.median(each.updates)
    flops = 3 * forward_flops(each.model)
    figures = {
        "ms": 1e3 * (passes * median + update),
        "ms_per_pass": 1e3 * median,
        "quartiles_ms": quartiles(each.gradients),
        "ms_optimizer": 1e3 * update,
        "tokens_per_second": tokens / (median + update / passes),
        "flops_per_token": flops,
        "mfu": flops * tokens / median / settings.peak_flops,
        "saved_bytes_per_token": round(describe(each.config)["activation_bytes_per_token"]),
        "peak_memory_bytes": each.peak if device.type == "cuda" else None,
        "over": {},
    }
    if baseline is not None and baseline is not each:
        other = statistics.median(baseline.updates)
        pairs = zip(each.gradients, baseline.gradients, strict=True)
        ratio = statistics.median((passes * a + update) / (passes * b + other) for a, b in pairs)
        figures["over"]["prenorm"] = ratio
        if device.type == "cuda":
            figures["peak_memory_over_prenorm"] = each.peak / baseline.peak
    return figures


BATCHES = (1, 8, 64)
"""Sequences that generate at once."""


def generation_step(settings: StepSettings, batch: int) -> dict:
    """The record of the case at one batch size: a row for every model."""
    device = settings.device
    base = settings.base()
    prefix = max(1, min(512, base.model.seq_len // 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.model.vocab_size, (batch, prefix + 1), generator=generator).to(device)
    running: list[tuple[dict, Callable[[], Tensor], str, list[float]]] = []
    rows, names = [], set()
    for label, config, kernels in settings.variants():
        label = label.replace(f", {config.model.stream_memory}", "")
        if label in names:  # without gradients nothing is stored, however it would be
            continue
        names.add(label)
        row = _row(label, config)
        rows.append(row)
        try:
            model = build_model(config, device).eval()
            _perturb(model)
            row |= _check_generation(model, config, kernels, ids[:1, : CHECK_TOKENS + 1])
            if row["status"] == "timed":
                running.append((row, _decoder(model, ids, prefix), kernels, []))
        except Exception as error:
            row |= _describe_failure(error)
    for round_ in range(-2, settings.rounds):
        for _, decode, kernels, seconds in running:
            with using(kernels):
                began = now(device)
                decode()
                if round_ >= 0:
                    seconds.append(now(device) - began)
    baseline = next((seconds for row, *_, seconds in running if row["candidate"] == "prenorm"), None)
    for row, *_, seconds in running:
        median = statistics.median(seconds)
        row["modes"] = {
            "token": {
                "ms": 1e3 * median,
                "quartiles_ms": quartiles(seconds),
                "tokens_per_second": batch / median,
                "over": {}
                if baseline is None or baseline is seconds
                else {"prenorm": statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))},
            }
        }
    return {**_shape(base), "batch": batch, "prefix": prefix, "rows": rows}


def _decoder(model: GPT, ids: Tensor, prefix: int) -> Callable[[], Tensor]:
    """A function that reads one more token of each sequence behind a cache of ``prefix`` tokens."""
    parameter = model.embed.weight
    cache = KVCache.empty(model.config, len(ids), prefix + 1, parameter.device, parameter.dtype)

    @torch.inference_mode()
    def decode(new: Tensor = ids[:, prefix:]) -> Tensor:
        cache.length = prefix
        return model(new, cache=cache)[:, -1]

    with torch.inference_mode():
        model(ids[:, :prefix], cache=cache)
    return decode


def _check_generation(model: GPT, config: TrainConfig, choice: str, ids: Tensor) -> dict:
    prefix = ids.shape[1] - 1

    @torch.inference_mode()
    def whole(other: GPT) -> Tensor:
        return other(ids)[:, -1]

    exact = copy.deepcopy(model).double()
    device = model.embed.weight.device
    return _judge(
        "logits",
        _decoder(model, ids, prefix),
        lambda: whole(exact),
        lambda: _decoder(_reference_model(model, config, device), ids, prefix)(),
        choice,
    )


STEP_CASES = {
    "training-step": ("forward, backward, clipping and optimiser of a preset: MFU and peak memory", ("all",)),
    "generation-step": (
        f"one new token per sequence over a key-value cache, {', '.join(map(str, BATCHES))} sequences",
        tuple(f"batch-{b}" for b in BATCHES),
    ),
}
"""Name -> what it is, and its variants."""
