"""Every public name says what it does, which types it takes and returns, and which shapes its tensors have."""

import public_names
import pytest
import torch

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
