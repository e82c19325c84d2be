"""Tests that need other packages run when asked for; examples that hypothesis draws are the same in every run."""

from pathlib import Path

from hypothesis import settings

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

ON_REQUEST = ("peers", "kernels")
"""Folders whose files import packages that only the extra ``peers`` installs; each named as its marker."""


def pytest_ignore_collect(collection_path: Path, config):
    """Such a folder is not there unless ``-m`` names it."""
    parts = collection_path.relative_to(config.rootpath).parts
    asked = config.getoption("markexpr")
    return True if any(name in parts and name not in asked for name in ON_REQUEST) else None
