"""As tests/test_public_api.py, of what needs transformers."""

import public_names
import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.hf

FOUND = public_names.callables(transformers=True)


@pytest.mark.parametrize("name", FOUND)
def test_docstring_annotations_and_shapes(name):
    assert public_names.lacks(*FOUND[name]) == []


def test_models_are_among_them():
    assert "depthmix.hf.modeling.DepthmixForCausalLM.forward" in FOUND
