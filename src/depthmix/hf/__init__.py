"""depthmix models in transformers: importing this makes ``model_type: depthmix`` known to the ``Auto...`` classes.

::

    import depthmix.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported")    # what `depthmix export RUN --to hf` wrote
    tokenizer = AutoTokenizer.from_pretrained("exported")

What :func:`depthmix.adapt` made and ``save_pretrained`` wrote is known too (:mod:`depthmix.adapters.huggingface`).
No code comes from the folder. Needs the extra ``hf``; ``import depthmix`` alone never loads transformers.
"""

import importlib.util

from ..errors import UserError

if importlib.util.find_spec("transformers") is None:
    raise UserError("depthmix.hf needs transformers, not installed here: pip install 'depthmix[hf]'")

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..adapters import huggingface  # noqa: F401  (registers adapted models)
from .configuration import DepthmixConfig
from .modeling import DepthmixForCausalLM, DepthmixModel

AutoConfig.register(DepthmixConfig.model_type, DepthmixConfig, exist_ok=True)
AutoModel.register(DepthmixConfig, DepthmixModel, exist_ok=True)
AutoModelForCausalLM.register(DepthmixConfig, DepthmixForCausalLM, exist_ok=True)
# `transformers serve` looks for the class that config.json names nowhere else.
transformers.DepthmixForCausalLM = DepthmixForCausalLM

__all__ = ["DepthmixConfig", "DepthmixForCausalLM", "DepthmixModel"]
