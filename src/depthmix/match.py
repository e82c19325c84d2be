"""Models of equal size: widen the smaller ones until their parameter counts agree.

A residual connection adds parameters of its own, so at one width the models of a comparison differ in
size. :func:`match_params` changes the width D and nothing else, in the coarsest step that comes close
enough::

    whole heads                    D = n_head * head size, with more heads of the same size
    multiples of 64, 32, ... 1     heads as they are: D is freed from them by ``head_size``
    multiples of 2, 1              with one more head, two, ... (thin models, where one feature of D is
                                   more than 2 % of the parameters)

Counts are exact: the model is built on the meta device, which allocates and computes nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import overload

import torch

from .config import GPTConfig
from .errors import UserError
from .info import parameter_counts
from .model import GPT

STEPS = (64, 32, 16, 8, 4, 2, 1)
"""Steps of D, in features, that are tried in this order where whole heads are too coarse."""
MORE_HEADS = 4
"""Heads that may be added at most where D alone is too coarse."""


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """:func:`depthmix.info.parameter_counts` of the model that ``config`` describes.

    Raises ``UserError`` when the connection cannot be built so.
    """
    with torch.device("meta"):
        return parameter_counts(GPT(config))


@overload
def match_params(
    configs: GPTConfig, target: int | GPTConfig | None = None, tolerance: float = 0.01
) -> GPTConfig: ...


@overload
def match_params(
    configs: Sequence[GPTConfig], target: int | GPTConfig | None = None, tolerance: float = 0.01
) -> list[GPTConfig]: ...


def match_params(
    configs: GPTConfig | Sequence[GPTConfig],
    target: int | GPTConfig | None = None,
    tolerance: float = 0.01,
) -> GPTConfig | list[GPTConfig]:
    """``configs`` with D widened so that each model has ``target`` parameters within ``tolerance``.

    Args:
        configs: one configuration, or several.
        target: number of parameters, or the configuration of the model that has it. ``None``: the largest
            of ``configs``.
        tolerance: largest deviation from ``target``, as a share of it.

    Returns the configuration (a list, for several). A model that is within ``tolerance`` and nearer than
    any wider one in whole heads stays as it is; none gets narrower. ``vocab_size`` counts: give the
    tokenizer's.

    Raises ``UserError``, with the closest width, when no width comes within ``tolerance``, and when a model
    is larger than ``target`` already.
    """
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance must be between 0 and 1, got {tolerance}")
    listed = [configs] if isinstance(configs, GPTConfig) else list(configs)
    if target is None:
        target = max(count_parameters(config)["total"] for config in listed)
    elif isinstance(target, GPTConfig):
        target = count_parameters(target)["total"]
    if target < 1:
        raise UserError(f"target must be a number of parameters of at least 1, got {target}")
    matched = [_match(config, target, tolerance) for config in listed]
    return matched[0] if isinstance(configs, GPTConfig) else matched


def _match(config: GPTConfig, target: int, tolerance: float) -> GPTConfig:
    @cache
    def count(candidate: _Width) -> int:
        return count_parameters(candidate.of(config))["total"]

    own = _Width(config.d_model, config.n_head, config.head_size)
    off = lambda candidate: abs(count(candidate) - target) / target  # noqa: E731
    if count(own) > target * (1 + tolerance):
        raise UserError(
            f"{config.label} with d_model {config.d_model} has {count(own):,} parameters, more than the "
            f"{target:,} asked for, and is not made narrower; choose a larger target or a smaller d_model"
        )
    closest = own
    for widths in _ways(config):
        here = min((own, *_around(widths, count, target)), key=off)
        if off(here) <= tolerance:
            return here.of(config)
        closest = min(closest, here, key=off)
    raise UserError(
        f"no width brings {config.label} to {target:,} parameters within {tolerance:.2%}: the closest is d_model "
        f"{closest.d_model} with {count(closest):,} ({off(closest):.2%} off); allow a larger tolerance"
    )


@dataclasses.dataclass(frozen=True)
class _Width:
    d_model: int
    n_head: int
    head_size: int | None

    def of(self, config: GPTConfig) -> GPTConfig:
        return dataclasses.replace(config, **dataclasses.asdict(self))


def _ways(config: GPTConfig) -> Iterator[Callable[[int], _Width]]:
    """For each step, the coarsest first: k = 1, 2, ... -> a width beyond the configuration's own."""
    if config.attention_width == config.d_model:
        head_size = config.head_size
        yield lambda k: _Width(config.d_model + k * config.head_dim, config.n_head + k, head_size)
    for step in STEPS:
        start = config.d_model // step
        yield partial(_stepped, start, step, config.n_head, config.head_dim)
    for heads in range(config.n_head + 1, config.n_head + MORE_HEADS + 1):
        for step in STEPS[-2:]:
            start = config.d_model // step
            yield partial(_stepped, start, step, heads, config.head_dim)


def _stepped(start: int, step: int, heads: int, head_size: int, k: int) -> _Width:
    return _Width((start + k) * step, heads, head_size)


def _around(
    widths: Callable[[int], _Width], count: Callable[[_Width], int], target: int
) -> tuple[_Width, ...]:
    """The widest model of at most ``target`` parameters and the next one (the count grows with the width)."""
    low, high = 0, 1
    while count(widths(high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(widths(middle)) <= target else (low, middle)
    return (widths(high),) if low == 0 else (widths(low), widths(high))
