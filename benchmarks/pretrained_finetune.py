"""How far a trained language model comes by fine-tuning under another connection: loss on held-out text on the way.

    python benchmarks/pretrained_finetune.py FOLDER TEXT... --state STATE --out results/pretrained-finetune.json

FOLDER is what ``scripts/unpack_smollm2.py`` writes (or any model that ``save_pretrained`` wrote), TEXT are text files,
perhaps ``.xz``. Needs the extra ``hf``. fp32, CPU.

Every connection starts at the trained function (``start="prenorm-scaled"``) and is given the same batches: windows of
``--length`` tokens that begin at random places of the texts. The first ``--held-out`` of each text is never trained on;
``--windows`` windows spread evenly over it are what the loss is measured on. AdamW with a constant rate behind a
warm-up, one for the model's own weights and one for the connection's parameters, which are new.

The connections take turns of ``--every`` steps. Behind each turn the loss is measured, weights and optimiser go to
``STATE`` and the numbers to ``--out``: a run that is stopped goes on with the turn that was cut, to the same numbers.
"""

import argparse
import json
import lzma
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from depthmix import adapt
from depthmix.config import folder_name
from depthmix.optim import decay_groups


class Texts:
    """Windows of ``length`` tokens of some files: drawn at random for training, spread evenly for measuring."""

    def __init__(self, paths: list[Path], tokenizer, length: int, held_out: float):
        self.tokenizer, self.length = tokenizer, length
        self.texts = []
        for path in paths:
            opened = lzma.open if path.suffix == ".xz" else open
            with opened(path, "rt", encoding="utf-8") as file:
                self.texts.append(file.read())
        self.cuts = [int(held_out * len(text)) for text in self.texts]
        self.span = 12 * length  # characters; a token of English has between four and five

    def batch(self, step: int, size: int) -> torch.Tensor:
        """``[size, length]`` of optimiser step ``step``, whatever the connection."""
        generator = torch.Generator().manual_seed(step)
        rooms = [len(text) - cut - self.span for text, cut in zip(self.texts, self.cuts, strict=True)]
        rows = []
        for place in torch.randint(sum(rooms), (size,), generator=generator).tolist():
            index = 0
            while place >= rooms[index]:
                place -= rooms[index]
                index += 1
            rows.append(self._window(index, self.cuts[index] + place))
        return torch.stack(rows)

    def held_out(self, windows: int) -> torch.Tensor:
        """``[windows, length]``, in proportion to the texts."""
        rows, total = [], sum(self.cuts)
        for number in range(windows):
            place, index = total * number // windows, 0
            while place >= self.cuts[index]:
                place -= self.cuts[index]
                index += 1
            rows.append(self._window(index, min(place, self.cuts[index] - self.span)))
        return torch.stack(rows)

    def _window(self, index: int, place: int) -> torch.Tensor:
        text = self.texts[index][place : place + self.span]
        ids = self.tokenizer(text[text.index(" ") :])["input_ids"]
        return torch.tensor(ids[: self.length])


@torch.no_grad()
def measure(model, ids: torch.Tensor) -> list[float]:
    """Mean loss in nats a token of every window."""
    model.eval()
    found = []
    for row in ids.split(4):
        logits = model(input_ids=row, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="none")
        found += losses.mean(1).tolist()
    return found


def is_new(name: str) -> bool:
    """Whether a parameter is the connection's."""
    return "_site." in name or "connection." in name


def optimiser(model, rate: float, new_rate: float) -> torch.optim.Optimizer:
    new = {id(p) for name, p in model.named_parameters() if is_new(name)}
    groups = []
    for group in decay_groups(model, weight_decay=0.01):
        for part, lr in ((True, new_rate), (False, rate)):
            parameters = [p for p in group["params"] if (id(p) in new) == part]
            if parameters:
                groups.append(group | {"params": parameters, "lr": lr, "rate": lr})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def turn(options, residual: str, texts: Texts, held_out: torch.Tensor, done: int) -> dict:
    """One turn of training behind step ``done``; what was measured behind it (and, at first, before it)."""
    kept = options.state / f"{folder_name(residual)}.pt"
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    model = adapt(model, residual, n_streams=options.n_streams, start="prenorm-scaled")
    found = {}
    if done == 0:
        found["0"] = measure(model, held_out)
    optimizer = optimiser(model, options.rate, options.new_rate)
    if done:
        state = torch.load(kept, weights_only=True)
        if state["step"] != done:
            raise SystemExit(f"{kept} is of step {state['step']}, {options.out} of step {done}; remove both")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    began, training = time.perf_counter(), []
    for step in range(done, done + options.every):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / options.warmup)
        ids = texts.batch(step, options.batch)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        training.append(loss.item())
    seconds = time.perf_counter() - began
    found[str(done + options.every)] = measure(model, held_out)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done + options.every}
    torch.save(state, kept.with_suffix(".new"))
    os.replace(kept.with_suffix(".new"), kept)
    new = sum(p.numel() for name, p in model.named_parameters() if is_new(name))
    print(
        f"{residual}, step {done + options.every}: held out {statistics.fmean(found[str(done + options.every)]):.4f}, "
        f"training {statistics.fmean(training):.4f}, {seconds / options.every:.2f} s a step",
        flush=True,
    )
    return {"windows": found, "training": training, "parameters_of_connection": new}


def summary(rows: list[dict]) -> None:
    """Means, and the difference to the first connection over the same windows with its standard error."""
    first = rows[0]["windows"]
    for row in rows:
        row["loss"] = {step: statistics.fmean(values) for step, values in row["windows"].items()}
        row["to_first"] = {}
        for step, values in row["windows"].items():
            if step in first and row is not rows[0]:
                apart = [a - b for a, b in zip(values, first[step], strict=True)]
                error = statistics.stdev(apart) / math.sqrt(len(apart))
                row["to_first"][step] = {"mean": statistics.fmean(apart), "standard_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--residuals", nargs="+", default=["prenorm", "hc:merge=mean", "mgr-competitive"])
    parser.add_argument("--n-streams", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--new-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.02)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder, local_files_only=True)
    texts = Texts(arguments.texts, tokenizer, arguments.length, arguments.held_out)
    held_out = texts.held_out(arguments.windows)
    arguments.state.mkdir(parents=True, exist_ok=True)
    names = "n_streams", "every", "batch", "length", "warmup", "rate", "new_rate", "held_out", "windows"
    result = {
        "model": arguments.folder.name,
        "texts": [path.name for path in arguments.texts],
        "start": "prenorm-scaled",
        **{name: getattr(arguments, name) for name in names},
        "rows": [{"residual": name, "windows": {}, "training": []} for name in arguments.residuals],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        for key in result.keys() - {"rows"}:
            if before[key] != result[key]:
                raise SystemExit(
                    f"{arguments.out} has {key} {before[key]}, and now it is {result[key]}; remove it"
                )
        known = {row["residual"]: row for row in before["rows"]}
        result["rows"] = [known.get(row["residual"], row) for row in result["rows"]]
    for done in range(0, arguments.steps, arguments.every):
        for row in result["rows"]:
            if len(row["training"]) > done:
                continue
            found = turn(arguments, row["residual"], texts, held_out, done)
            row["windows"] |= found["windows"]
            row["training"] += found["training"]
            row["parameters_of_connection"] = found["parameters_of_connection"]
            summary(result["rows"])
            text = json.dumps(result, indent=1) + "\n"
            beside = arguments.out.with_suffix(".new")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, arguments.out)


if __name__ == "__main__":
    main()
