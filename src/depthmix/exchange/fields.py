"""What of a ``config.json`` makes a :class:`depthmix.GPTConfig`, and how large it may be."""

import dataclasses

from ..config import GPTConfig
from ..errors import UserError

FIELDS = tuple(field.name for field in dataclasses.fields(GPTConfig))

LIMITS = {
    "vocab_size": 1 << 24,
    "n_layer": 1 << 12,
    "d_model": 1 << 17,
    "n_head": 1 << 12,
    "seq_len": 1 << 24,
    "head_size": 1 << 12,
}
"""Largest values that are taken from a file: far beyond any model, and too small to fill a machine by one number."""


def make_config(values) -> GPTConfig:
    """The configuration whose fields are attributes of ``values``.

    Raises:
        ValueError: a field has a value that it cannot have.
    """
    try:
        return GPTConfig(**{name: getattr(values, name) for name in FIELDS})
    except TypeError as error:  # a word where a number is compared
        raise UserError(f"config.json: {error}") from error
