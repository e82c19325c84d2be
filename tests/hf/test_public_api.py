"""As tests/test_public_api.py, of what needs transformers."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.hf

_spec = importlib.util.spec_from_file_location("public_names", Path(__file__).parents[1] / "public_names.py")
public_names = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(public_names)

FOUND = public_names.callables(transformers=True)


@pytest.mark.parametrize("name", FOUND)
def test_docstring_annotations_and_shapes(name):
    assert public_names.lacks(*FOUND[name]) == []


def test_models_are_among_them():
    assert "depthmix.hf.modeling.DepthmixForCausalLM.forward" in FOUND
