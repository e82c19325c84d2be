"""Every public name says what it does, which types it takes and returns, and which shapes its tensors have."""

import tomllib
from pathlib import Path

import public_names
import pytest
import torch

ROOT = Path(__file__).parents[1]
FOUND = public_names.callables(transformers=False)


@pytest.mark.parametrize("name", FOUND)
def test_docstring_annotations_and_shapes(name):
    assert public_names.lacks(*FOUND[name]) == []


def test_what_is_lacking_is_found():
    """The walk reaches methods, and misses nothing of what a function can lack."""
    names = ("GPT.forward", "KVCache.empty", "functional.attention_pool", "MultiGateResidual.forward")
    assert {f"depthmix.{name}" for name in names} <= FOUND.keys() and len(FOUND) > 100

    def bare(x, *rest, y: int = 0): ...

    def shapeless(x: torch.Tensor) -> torch.Tensor:
        """Some ``list[int]``."""

    def whole(x: torch.Tensor) -> "torch.Tensor":
        """``x [..., D]`` as it is."""

    wanted = ["docstring", "annotation of x", "annotation of rest", "annotation of what is returned"]
    assert public_names.lacks(bare, None) == wanted
    assert public_names.lacks(shapeless, None) == ["shape"]
    assert public_names.lacks(whole, None) == []


def test_every_page_of_the_reference_is_walked():
    documented = public_names.documented()
    assert {"depthmix.functional", "depthmix.wrapping", "depthmix.residuals.base"} <= documented.keys()
    assert documented["depthmix.wrapping"] == ["wrap"]


def test_the_oldest_torch_that_is_admitted_is_the_one_that_is_tested():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    (floor,) = (line.removeprefix("torch>=") for line in wanted if line.startswith("torch"))
    assert f"torch=={floor}.0" in pinned
