"""``depthmix eval``: loss of any text, and tasks of lm-eval."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from .. import flags
from ..errors import UserError
from .progress import Progress

if TYPE_CHECKING:
    from ..data.sources import Reading, Source


@dataclass(frozen=True)
class Eval:
    """Measure a trained model: the loss of any text under a sliding window, and tasks of lm-eval.

    Results are printed and written to RUN/evaluation. A request longer than the model's context is refused, or cut and
    counted with --truncate.

    Example: depthmix eval runs/mgr --tasks continuation --text README.md --stride 64
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder (its best checkpoint is taken, else its newest), or one checkpoint folder in it."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (extra eval), commas or spaces between; those that come with depthmix: continuation."""
    text: tuple[str, ...] = ()
    """Files, folders or globs of text. A line of a .jsonl or a row of a .parquet is one document, any other file
    is one as a whole; .gz, .xz and .zst are unpacked."""
    include_path: Path | None = None
    """Folder of task files of your own. They are programs: only those that you trust."""
    fewshot: int | None = None
    """Examples before each question. Default: as the task says."""
    limit: int | None = None
    """First so many questions of each task only."""
    max_new_tokens: int | None = None
    """Tokens generated at most, in tasks that generate. Default: as the task says, else 256."""
    context: int | None = None
    """With --text: tokens that a window reads. Default: the model's context."""
    stride: int | None = None
    """With --text: tokens by which the window moves on, 1 to context; smaller is slower and closer to the loss with
    full context everywhere. Default: half of the context."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet."""
    tokens: int | None = None
    """With --text: score its first so many tokens alone, as if it ended there. Default: all."""
    batch_size: int = 16
    """Sequences of a forward pass."""
    truncate: FlagCreatePairsOff[bool] = False
    """Leave out the beginning of a task's request that is longer than the model's context, and count it."""
    out: Path | None = None
    """File for the results. Default: RUN/evaluation/CHECKPOINT-NAMES.json."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""


def main(argv: list[str]) -> int:
    """The verb ``eval``; returns its exit status."""
    args = flags.parse(Eval, argv, "eval")
    names = [name for words in args.tasks for name in words.split(",") if name]
    if not names and not args.text:
        raise UserError("nothing to do: name --tasks, for example --tasks continuation, or a --text")
    for flag in ("fewshot", "limit", "max_new_tokens", "tokens"):
        value = getattr(args, flag)
        if value is not None and value < (0 if flag == "fewshot" else 1):
            raise UserError(f"--{flag.replace('_', '-')} must not be that small: {value}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")

    from ..checkpoint import checkpoint_at
    from ..device import find_device
    from ..report.write import write_atomically
    from ..runs import open_run, run_tokenizer

    texts = Documents(args.text, args.text_field) if args.text else None
    run = open_run(Path(args.run), find_device(args.device))
    tokenizer = run_tokenizer(run.folder)
    checkpoint = checkpoint_at(Path(args.run))
    values: dict = {
        "format": 1,
        "command": "depthmix eval " + shlex.join(argv),
        "run": run.name,
        "checkpoint": checkpoint.name,
        "residual": run.config.model.label,
        "tokenizer": tokenizer.name,
        "context": run.config.model.seq_len,
    }
    if texts is not None:
        from .perplexity import perplexity

        with Progress("text") as progress:
            found = perplexity(
                run.model, tokenizer, texts, context=args.context, stride=args.stride, tokens=args.tokens,
                batch_size=args.batch_size,
                told=lambda tokens, size: progress.show(
                    texts.share(size) if args.tokens is None else max(tokens / args.tokens, texts.share(size)),
                    tokens, "tokens",
                ),
            )  # fmt: skip
        values["text"] = {"files": [*args.text], **found.to_dict()}
    if names:
        from .harness import DepthmixLM, run_tasks

        with Progress("tasks") as progress:
            model = DepthmixLM(
                run.model, tokenizer, batch_size=args.batch_size, truncate=args.truncate,
                told=lambda done, total: progress.show(done / total, done, "requests"),
            )  # fmt: skip
            values["tasks"] = run_tasks(
                model, names, include_path=args.include_path, num_fewshot=args.fewshot, limit=args.limit,
                max_new_tokens=args.max_new_tokens,
            )  # fmt: skip
    _print(values)
    out = args.out or run.folder / "evaluation" / f"{checkpoint.name}-{_label(names, args.text)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(values, indent=1, default=str) + "\n").encode())
    print(f"written: {out}")
    return 0


def _label(names: list[str], texts: tuple[str, ...]) -> str:
    import hashlib

    from ..runs import file_name

    label = file_name("-".join([*names, *(Path(text).name.split(".")[0] for text in texts)])) or "text"
    if len(label) > 100:
        label = f"{label[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return label


class Documents:
    """Texts of the files, one after the other; a ``.txt`` or a file of unknown ending whole.

    Raises ``UserError`` at once for what is missing.
    """

    def __init__(self, paths: tuple[str, ...], text_field: str):
        from ..data.sources import FileSource, _endings, find_sources

        self._sources: list[Source] = []
        for given in paths:
            path = Path(given).expanduser()
            if path.is_file() and _endings(path) is None:
                status = path.stat()
                self._sources.append(
                    FileSource(path, ".txt", "", status.st_size, status.st_mtime_ns, text_field)
                )
            else:
                self._sources += find_sources((given,), text_field)
        self._size = sum(source.size for source in self._sources)
        self._before, self._known = 0, 0
        self._reading: Reading | None = None

    def __iter__(self):
        from ..data.sources import Reading
        from ..data.tokenizers import to_utf8

        for source in self._sources:
            self._reading = Reading()
            whole = []
            for block in source.blocks(self._reading):
                texts = [text for _, text in block.documents()]
                self._known += sum(len(to_utf8(text)) for text in texts)
                if source.format == ".txt":
                    whole += texts
                else:
                    yield from texts
            self._before += source.size
            self._reading = None
            if whole:
                yield "".join(whole)

    def share(self, size: float) -> float:
        """Of all text, 0 to 1, where ``size`` bytes of it are done. A guess while files are left, by their sizes."""
        read = self._before + (self._reading.bytes if self._reading else 0)
        return 0.0 if not self._known else size / self._known * min(1.0, read / max(1, self._size))


def _print(values: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(
        f"{values['run']}, {values['checkpoint']}: {values['residual']}, tokenizer {values['tokenizer']}, context "
        f"{values['context']}",
        markup=False,
    )
    if "text" in values:
        text = values["text"]
        word = text["word_perplexity"]
        console.print(
            f"{text['documents']:,} documents, {text['tokens']:,} tokens, {text['bytes']:,} bytes, {text['words']:,} "
            f"words; window {text['context']}, stride {text['stride']}\n"
            f"loss {text['loss']:.4f} nats a token, perplexity {text['token_perplexity']:,.7g} a token, "
            f"{text['byte_perplexity']:.4f} a byte, {'beyond a float' if word is None else f'{word:,.7g}'} a word; "
            f"{text['bits_per_byte']:.4f} bits a byte",
            markup=False,
        )
    if "tasks" in values:
        tasks = values["tasks"]
        table = Table("task", "metric", "value", "±", "questions", "examples", box=None)
        for name, row in tasks["results"].items():
            for key, value in row.items():
                metric, _, kind = key.partition(",")
                if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not kind:
                    continue
                error = row.get(f"{metric}_stderr,{kind}")
                table.add_row(
                    name, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "",
                    str(tasks.get("n-samples", {}).get(name, {}).get("effective", "")),
                    str(tasks.get("n-shot", {}).get(name, "")),
                )  # fmt: skip
        console.print(table)
        if tasks["truncated"]:
            console.print(
                f"{tasks['truncated']:,} requests were longer than the context: their beginnings were left out"
            )
