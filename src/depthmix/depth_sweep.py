"""``depthmix depth-sweep``: which residual connections still learn as the network gets deeper.

Thin models, every (connection, depth, seed) a cell: a process of its own that runs ``depthmix train``
(:mod:`depthmix.compare` has the machinery). Several may run side by side, as no speed is compared.

    OUT/sweep.json              what was asked for, and which cells failed
    OUT/cells/CELL.json, .log   a cell's configuration and what its process printed
    OUT/CELL/                   its run folder (checkpoints are dropped once it is finished)
    OUT/depth.json              every cell's numbers; all that follows is made from this file alone, and
                                --resume extends a sweep of which only this file is left
    OUT/depth-loss.png, depth-gradient.png, depth.html

What the numbers mean and when a cell counts as stalled: :mod:`depthmix.report.depth`.
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import FlagCreatePairsOff

from . import flags
from .compare import (
    Cell,
    Runner,
    cell_config,
    labels,
    lock_folder,
    prepare_data,
    refuse_if_changed,
    refuse_if_taken,
    shared_config,
)
from .config import GPTConfig, TrainConfig, folder_name, from_dict
from .errors import EXIT_FAILED, UserError
from .presets import preset
from .report.depth import LAST_STEPS, judge, print_tables, read_depth, write_depth_report
from .report.records import RunRecord, read_json, read_run
from .report.write import write_atomically

DEFAULT_OUT = "runs/depth"
RECIPE = "depth"


@dataclass(frozen=True)
class DepthSweep:
    """Train thin models with several residual connections at several depths and show which still learn.

    Ends with tables, two figures and a depth.html. Ctrl-C saves and leaves with status 75; --resume goes on
    from there, also after any other end: finished runs are kept.

    Example: depthmix depth-sweep --residuals all,review-convex:bias=-2 --sublayers 8,32,96 --jobs 2
    """

    training: flags.DepthFlags
    sublayers: tuple[str, ...] = ("8", "16", "32", "64", "96")
    """Depths, in sublayers (attentions plus MLPs, so even numbers), with commas or spaces between."""
    residuals: tuple[str, ...] = ("all",)
    """Residual connections, with commas or spaces between, each with options where wanted:
    name:option=value. all stands for every one; `depthmix info --list` names them."""
    seeds: int = 1
    """Runs of each connection at each depth."""
    jobs: int = 1
    """Runs side by side."""
    threads_per_run: int | None = None
    """CPU threads of a run. Default: 1 with --jobs above 1, else what torch takes."""
    out: str | None = None
    """Folder for everything. Default: runs/depth."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on with a stopped sweep: finished runs are kept, the rest is run."""
    redraw: FlagCreatePairsOff[bool] = False
    """Train nothing: make tables, figures and page again from OUT/depth.json alone."""


def main(argv: list[str]) -> int:
    """The verb ``depth-sweep``; returns its exit status."""
    out = Path(flags.given(argv, "--out") or DEFAULT_OUT)
    saved = (read_json(out / DepthRunner.plan_file) or _plan_of_figures(out)) if "--resume" in argv else None
    args = flags.parse(DepthSweep, argv, "depth-sweep", _defaults(saved))
    if args.redraw:
        show(out)
        return 0
    for name in ("jobs", "threads_per_run"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    plan = make_plan(args)
    if saved is not None:
        refuse_if_changed(saved, plan, out, "sweep")
        gone = [depth for depth in saved["sublayers"] if depth not in plan["sublayers"]]
        if gone:
            raise UserError(
                f"{out} holds a sweep with {', '.join(map(str, gone))} sublayers too; --resume takes them, or more"
            )
        plan["starts"] = saved.get("starts", {})
        plan["failures"] = saved.get("failures", {})
    else:
        refuse_if_taken(out, "sweep")
    again = "depthmix depth-sweep --out " + shlex.quote(str(out)) + " --resume"
    again += f" --jobs {args.jobs}" * (args.jobs > 1)
    threads = args.threads_per_run or (1 if args.jobs > 1 else None)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        runner = DepthRunner(out, plan, again, lock, args.jobs, threads)
        runner.save()
        config = from_dict(plan["config"])
        plan["vocab_size"] = prepare_data(config, again)
        plan["unigram_loss"] = unigram_loss(config)
        return runner.run()
    finally:
        os.close(lock)


def _defaults(saved: dict | None) -> DepthSweep:
    """What the options are compared with: the saved sweep when it goes on, else the preset."""
    if saved is None:
        return DepthSweep(training=flags.to_flags(preset(RECIPE), flags.DepthFlags))
    return DepthSweep(
        training=flags.to_flags(from_dict(saved["config"]), flags.DepthFlags),
        sublayers=tuple(map(str, saved["sublayers"])),
        residuals=tuple(saved["residuals"]),
        seeds=saved["seeds"],
    )


def _plan_of_figures(out: Path) -> dict | None:
    """What a ``depth.json`` without its run folders was asked for: a sweep of others can be extended."""
    data = read_json(out / "depth.json")
    if data is None:
        return None
    plan = {key: data[key] for key in ("residuals", "sublayers", "seeds", "config")}
    return {**plan, "recipe": RECIPE}


def make_plan(args: DepthSweep) -> dict:
    """``sweep.json``: connections, depths, seeds, the shared configuration, and the cells in their order.

    The shallow ones come first, as they are the quickest to show something.
    """
    depths = parse_depths(args.sublayers)
    config = shared_config(args)
    residuals = labels(args.residuals, config.model)
    plan = {
        "recipe": RECIPE,
        "residuals": residuals,
        "sublayers": depths,
        "seeds": args.seeds,
        "config": config.to_dict(),
        "cells": [
            {
                "name": f"{folder_name(residual)}-L{depth}-s{seed}",
                "residual": residual,
                "sublayers": depth,
                "seed": seed,
                "model": {"n_layer": depth // 2},
                "size": depth,
            }
            for seed in range(config.seed, config.seed + args.seeds)
            for depth in depths
            for residual in residuals
        ],
        "starts": {},
        "failures": {},
    }
    return json.loads(json.dumps(plan))


def parse_depths(words: tuple[str, ...]) -> list[int]:
    """The depths of ``--sublayers``, ascending. Raises ``UserError`` for none, for odd ones and for one given twice."""
    depths = sorted(_depth(word) for given in words for word in given.split(",") if word)
    if not depths:
        raise UserError("--sublayers names no depth; give even numbers such as 8,32,96")
    if len(set(depths)) < len(depths):
        raise UserError(f"--sublayers names a depth more than once: {', '.join(map(str, depths))}")
    return depths


def _depth(word: str) -> int:
    if not word.isdecimal() or int(word) < 2 or int(word) % 2:
        raise UserError(
            f"--sublayers takes even numbers of at least 2 (a block is an attention and an MLP), got {word!r}"
        )
    return int(word)


def unigram_loss(config: TrainConfig) -> float:
    """Nats per token of the training data when each token is predicted by its frequency alone.

    The least loss of a model that does not see its input.
    """
    from .data import open_dataset, prepare

    tokens = open_dataset(prepare(config.data)).train
    counts = np.zeros(1, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):
        part = np.bincount(tokens.read(start, min(1 << 24, len(tokens) - start)))
        counts = np.pad(counts, (0, max(0, part.size - counts.size)))
        counts[: part.size] += part
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


class DepthRunner(Runner):
    """Runs the cells of a sweep and keeps ``depth.json`` up to date."""

    plan_file = "sweep.json"

    def __init__(self, out: Path, *args):
        super().__init__(out, *args)
        # Ended cells whose run folders are gone: depth.json is what is left of them.
        self.kept = {
            row["name"]: row
            for row in (read_json(out / "depth.json") or {"cells": []})["cells"]
            if row["status"] in ("finished", "diverged") and not (out / row["name"]).exists()
        }

    def command(self, config_file, folder):
        return [*super().command(config_file, folder), "--no-report"]

    def _load(self, cell: Cell) -> None:
        super()._load(cell)
        if cell.state == "finished":
            self._drop_checkpoints(cell)
        elif (self.out / cell.name / "diverged.json").exists():
            # Training repeats exactly: it would only end there again.
            cell.state = "diverged"
        elif cell.name in self.kept:
            cell.state, cell.step = self.kept[cell.name]["status"], cell.steps

    def _end(self, active) -> None:
        super()._end(active)
        cell = active.cell
        if cell.state == "failed" and (self.out / cell.name / "diverged.json").exists():
            cell.state = "diverged"
        if cell.state == "finished":
            self._drop_checkpoints(cell)
        if cell.state in ("finished", "diverged"):
            planned = next(entry for entry in self.plan["cells"] if entry["name"] == cell.name)
            key = _start_key(planned)
            if key not in self.plan["starts"]:
                model = cell_config(self.plan, planned).model
                model = dataclasses.replace(model, vocab_size=self.plan["vocab_size"])
                self.plan["starts"][key] = starting_point(model)
                self.save()
        _write_json(self.out / "depth.json", collect(self.out, self.plan, self.kept))

    def _drop_checkpoints(self, cell: Cell) -> None:
        shutil.rmtree(self.out / cell.name / "checkpoints", ignore_errors=True)

    def _finish(self) -> int:
        _write_json(self.out / "depth.json", collect(self.out, self.plan, self.kept))
        show(self.out)
        failed = [cell for cell in self.cells if cell.state == "failed"]
        self.complain(failed)
        return EXIT_FAILED if failed else 0


def _start_key(cell: dict) -> str:
    return f"{cell['residual']} {cell['sublayers']}"


def _write_json(path: Path, values: dict) -> None:
    write_atomically(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def show(out: Path) -> None:
    """Tables on the terminal, figures and page, from ``OUT/depth.json`` alone."""
    page = write_depth_report(out)
    print_tables(read_depth(out))
    print(f"page: {page}")


def starting_point(config: GPTConfig) -> dict:
    """Parameters, every option of the connection with its value, and the biases that its gates start from.

    ``initial_bias``: parameter -> smallest and largest value over all sites, for the connection's parameters
    whose name ends in ``bias`` (those of norms left out).
    """
    from .info import parameter_counts
    from .model import GPT
    from .residuals import registry

    options = dataclasses.asdict(registry.make_options(config.residual, config.residual_options))
    options |= {name: getattr(config, name) for name in registry.find(config.residual).fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT(config, seed=0)
    biases: dict[str, list[float]] = {}
    for block in model.blocks:
        for site in (block.attn_site, block.mlp_site):
            for name, parameter in site.named_parameters():
                if name.endswith("bias") and not name.endswith("norm_bias"):
                    low, high = parameter.min().item(), parameter.max().item()
                    before = biases.get(name, [low, high])
                    biases[name] = [min(before[0], low), max(before[1], high)]
    counts = parameter_counts(model)
    start = {
        "parameters": counts["total"],
        "connection_parameters": counts["connection"],
        "options": options,
        "initial_bias": biases,
    }
    gate_summary = getattr(model.residual, "gate_summary", None)
    if gate_summary is not None:
        start["gate"] = gate_summary()
    return start


def collect(out: Path, plan: dict, kept: dict[str, dict]) -> dict:
    """``depth.json``: what was asked for and every cell's numbers and verdict, from the run folders.

    ``kept``: rows of an earlier ``depth.json`` by name, for cells without a folder.
    """
    cells, environment = [], (read_json(out / "depth.json") or {}).get("environment", {})
    for planned in plan["cells"]:
        if planned["name"] in kept:
            cells.append(kept[planned["name"]])
            continue
        folder = out / planned["name"]
        record = read_run(folder) if (folder / "config.json").exists() else None
        environment = environment or (record.environment if record else {})
        row = {
            "name": planned["name"],
            "label": planned["residual"],
            "sublayers": planned["sublayers"],
            "seed": planned["seed"],
            **_numbers(record),
            **plan["starts"].get(_start_key(planned), {}),
        }
        if record is None:
            row["status"] = "not begun"
        elif record.result is not None:
            row["status"] = "finished"
        elif (diverged := read_json(folder / "diverged.json")) is not None:
            row["status"], row["error"] = "diverged", diverged.get("message")
        else:
            row["status"] = "unfinished"
        if row["status"] in ("not begun", "unfinished") and planned["name"] in plan["failures"]:
            row["status"], row["error"] = "failed", plan["failures"][planned["name"]]
        cells.append(row)
    data = {
        "residuals": plan["residuals"],
        "sublayers": plan["sublayers"],
        "seeds": plan["seeds"],
        "unigram_loss": plan["unigram_loss"],
        "config": plan["config"],
        "environment": environment,
        "cells": cells,
    }
    judge(data)
    return data


def _numbers(record: RunRecord | None) -> dict:
    """The measures of one run, as far as it got."""
    result = (record and record.result) or {}
    numbers = {
        "parameters": result.get("parameters"),
        "connection_parameters": result.get("connection_parameters"),
        "steps": 0,
        "initial_loss": None,
        "train_loss": None,
        "largest_loss": None,
        "val_loss": result.get("val_loss"),
        "gradient_first": {"initial": None, "median": None, "final": None},
        "wall_seconds": result.get("wall_seconds"),
    }
    if record is None or not record.steps_done:
        return numbers
    losses = record.train["loss"].tolist()
    norms = [norm for norm in record.train["grad_norm_first"].tolist() if math.isfinite(norm)]
    numbers |= {
        "steps": record.steps_done,
        "initial_loss": losses[0],
        "train_loss": statistics.fmean(losses[-LAST_STEPS:]),
        "largest_loss": max(losses),
    }
    if norms:
        numbers["gradient_first"] = {
            "initial": norms[0],
            "median": statistics.median(norms),
            "final": statistics.median(norms[-LAST_STEPS:]),
        }
    return numbers
