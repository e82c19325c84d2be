"""Declared studies: many runs, paired by seed, as a queue that survives; tables and pages from what they leave."""

from .declare import Study, load
from .records import Record, read_records

__all__ = ["Record", "Study", "load", "read_records"]
