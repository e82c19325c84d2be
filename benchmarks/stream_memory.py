"""Bytes that a forward pass keeps for the backward pass, per token: every way to get the streams, beside the rivals.

Counted, not estimated: every tensor that autograd saves for one more sequence, each storage once
(:func:`depthmix.info.activation_bytes_per_token`). Models have shapes and no numbers, except for inversion, whose
anchors depend on the gates: those run, at their initial weights.

    python benchmarks/stream_memory.py --out benchmarks/results/stream-memory.json
"""

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from training_step import machine

from depthmix import GPT
from depthmix.info import activation_bytes_per_token, describe
from depthmix.presets import preset

PRECISIONS = ("fp32", "autocast", "bf16")
MULTI_GATE = "mgr-competitive"


@dataclass
class Options:
    """Saved bytes per token for PreNorm, Multi-Gate Residuals with each stream_memory, AttnRes and mHC.

    Example: python benchmarks/stream_memory.py --preset S --precisions bf16
    """

    preset: str = "M"
    """Preset to count."""
    precisions: tuple[str, ...] = PRECISIONS
    """fp32, autocast, bf16."""
    streams: tuple[int, ...] = (4, 8)
    """Streams n of Multi-Gate Residuals and mHC."""
    out: Path | None = None
    """Write the figures here as JSON."""


def rows(streams: tuple[int, ...]) -> list[dict]:
    """What changes in the model's configuration, by row."""
    found = [{"residual": "prenorm"}]
    for n in streams:
        for memory in ("store", "inversion", "replay"):
            found.append({"residual": MULTI_GATE, "n_streams": n, "stream_memory": memory})
    found += [{"residual": "attnres"}, {"residual": "attnres-block:blocks=8"}]
    return found + [{"residual": "mhc", "n_streams": n} for n in streams]


def saved(config, changes: dict) -> float:
    """Bytes per token."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    if changes.get("stream_memory") != "inversion":
        return describe(config)["activation_bytes_per_token"]
    model = GPT(config.model, seed=0).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return activation_bytes_per_token(model, config.precision)


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    command = shlex.join(["python", "benchmarks/stream_memory.py", *sys.argv[1:]])
    results = {
        "command": command,
        "machine": machine(torch.device("cpu")),
        "preset": options.preset,
        "rows": [],
    }
    for precision in options.precisions:
        config = dataclasses.replace(preset(options.preset), precision=precision)
        base = None
        print(f"preset {options.preset}, {precision}: bytes saved per token")
        for changes in rows(options.streams):
            found = saved(config, changes)
            base = found if base is None else base
            label = " ".join(str(value) for value in changes.values())
            row = {
                "precision": precision,
                **changes,
                "bytes_per_token": round(found),
                "ratio": round(found / base, 4),
            }
            results["rows"].append(row)
            print(f"  {label:<32}{found:>14,.0f}   {found / base:.3f} x PreNorm", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
