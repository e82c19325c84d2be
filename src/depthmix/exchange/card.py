"""The model card: what the run was and what it reached, from the files of its folder alone."""

from pathlib import Path

from ..config import TrainConfig
from ..report.records import RunRecord
from ..report.reproduce import train_command
from ..source import commit


def card(
    config: TrainConfig,
    record: RunRecord | None,
    step: int,
    parameters: int,
    tokenizer: str,
    standalone: bool,
) -> str:
    """``README.md`` of an exported folder, for the weights of optimiser step ``step``."""
    model, made_by = config.model, commit(40)
    rows = [
        ("residual connection", f"`{model.label}`"),
        ("parameters", f"{parameters:,}"),
        ("blocks, width, heads", f"{model.n_layer}, {model.d_model}, {model.n_head}"),
        ("streams", f"{model.n_streams}" if "n_streams" in _shared(model.residual) else None),
        ("context", f"{model.seq_len:,} tokens"),
        ("optimiser step", f"{step:,} of {config.steps:,}"),
        ("tokens seen", f"{step * config.tokens_per_step:,}"),
        ("training loss", _loss(record, "train", step)),
        ("validation loss", _loss(record, "val", step)),
        ("data", ", ".join(f"`{Path(one).name}`" for one in config.data.data) or "Python's standard library"),
        ("tokenizer", f"`{tokenizer}`"),
        ("precision", f"`{config.precision}`"),
        ("seed", str(config.seed)),
        ("trained with", _versions(record)),
        ("exported from commit", f"`{made_by}`" if made_by else None),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    first = "" if standalone else "import depthmix.hf  # pip install 'depthmix[hf]'\n"
    trust = ", trust_remote_code=True" if standalone else ""
    return CARD.format(
        label=model.label,
        table=table,
        first=first,
        trust=trust,
        command=train_command(_without_places(config)),
    )


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- depthmix
- residual-connections
---

# A language model with the residual connection `{label}`

A decoder with rotary positions, RMSNorm, a squared-ReLU MLP and tied embeddings, trained from scratch by depthmix, a
library for residual connections that mix depth ([Multi-Gate Residuals](https://arxiv.org/abs/2605.23259), rivals).
Losses are means in nats per token.

| | |
|---|---|
{table}

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer(["Once"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True)[0]))
```

The end of a document is the token `<|endoftext|>`, which also begins one and pads batches (on the left). Trained by

```sh
{command}
```

It was trained to compare residual connections. Nobody has looked at what it says: do not put it in front of people.
"""


def _shared(residual: str) -> tuple[str, ...]:
    from ..residuals.registry import find

    return find(residual).fields


def _loss(record: RunRecord | None, split: str, step: int) -> str | None:
    if record is None:
        return None
    values = record.train if split == "train" else record.val
    found = values["loss"][values["step"] == step]
    return f"{found[0]:.4f}" if found.size else None


def _versions(record: RunRecord | None) -> str | None:
    environment = {} if record is None else record.environment
    known = [f"{name} {environment[name]}" for name in ("depthmix", "torch") if name in environment]
    return ", ".join(known) or None


def _without_places(config: TrainConfig) -> dict:
    """The configuration as a card shows it: folders of the machine that trained are nobody's business."""
    values = config.to_dict()
    values["data"] |= {"data": [Path(one).name for one in config.data.data], "cache_dir": None}
    return values
