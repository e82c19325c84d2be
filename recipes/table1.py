"""The exact command of every cell of Table 1 of the paper (arXiv 2605.23259), and what it is expected to cost.

    python recipes/table1.py                       every cell: parameters, the paper's losses, estimated hours
    python recipes/table1.py M/mgr-competitive-n8  its command on one GPU; --gpus 8 on eight
    python recipes/table1.py --markdown            the listing of recipes/README.md

Hours are those of ``depthmix plan`` (a data sheet times assumed efficiencies, docs/parallel-plan.md): estimates, no
measurement. They are of training alone; 80 evaluations of 10.5 M tokens add about 3 %.
"""

import argparse
import shlex
from dataclasses import dataclass

STEPS = 20_000
DATA = "shards/fineweb"
PREPARE = f"depthmix data fineweb --tokens 10B --out {DATA}"

ROWS = {
    "prenorm": (("prenorm",), ("2.9280 / 2.9440", "2.7286 / 2.7314", "2.6306 / 2.6213")),
    "mhc-lite-n4": (("mhc-lite", "--n-streams", "4"), ("2.8992 / 2.9145", "2.7157 / 2.7082", None)),
    "attnres-block-N4": (
        ("attnres-block:blocks=4",),
        ("2.8951 / 2.9107", "2.6994 / 2.7009", "2.6054 / 2.5946"),
    ),
    "attnres-block-N8": (
        ("attnres-block:blocks=8",),
        ("2.8921 / 2.9081", "2.6952 / 2.6970", "2.6925 / 2.5921"),
    ),
    "attnres": (("attnres",), ("2.8911 / 2.9066", "2.6930 / 2.6947", "2.6036 / 2.5920")),
    "mgr-independent-n4": (
        ("mgr-independent", "--n-streams", "4"),
        ("2.8887 / 2.9040", "2.6911 / 2.6929", "2.6006 / 2.5903"),
    ),
    "mgr-competitive-n4": (
        ("mgr-competitive", "--n-streams", "4"),
        ("2.8889 / 2.9045", "2.6889 / 2.6911", "2.6001 / 2.5898"),
    ),
    "mgr-independent-n8": (
        ("mgr-independent", "--n-streams", "8"),
        ("2.8877 / 2.9034", "2.6896 / 2.6912", "2.5994 / 2.5887"),
    ),
    "mgr-competitive-n8": (
        ("mgr-competitive", "--n-streams", "8"),
        ("2.8869 / 2.9020", "2.6891 / 2.6908", "2.5966 / 2.5857"),
    ),
}
"""Name of a row: the connection as the command line has it, and the paper's train / validation loss of S, M, L."""


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    size: str
    row: str
    losses: str
    """Train / validation loss as the paper prints them."""

    @property
    def name(self) -> str:
        return f"{self.size}/{self.row}"

    def arguments(self) -> list[str]:
        """What ``depthmix`` is given on one GPU."""
        residual, *more = ROWS[self.row][0]
        out = f"runs/table1/{self.size}-{self.row}"
        return [
            "train", "--preset", self.size, "--residual", residual, *more, "--data", DATA, "--out", out,
        ]  # fmt: skip

    def command(self, gpus: int = 1) -> str:
        """The line to type. It goes on where it stopped with ``--resume`` behind it."""
        if gpus == 1:
            return shlex.join(["depthmix", *self.arguments()])
        words = ["torchrun", f"--nproc-per-node={gpus}", "-m", "depthmix", *self.arguments()]
        return shlex.join([*words, "--parallel", f"dp={gpus}"])

    def config(self):
        """The configuration that the command stands for, data and folder aside."""
        import dataclasses

        from depthmix.presets import preset

        residual, *more = ROWS[self.row][0]
        base = preset(self.size)
        streams = {"n_streams": int(more[1])} if more else {}
        return dataclasses.replace(base, model=dataclasses.replace(base.model, residual=residual, **streams))

    def hours(self, gpus: int, hardware: str = "h100") -> float | None:
        """Of 20,000 steps, by ``depthmix plan``'s model; None where the memory would not do."""
        from depthmix.parallel.cost import estimate
        from depthmix.parallel.hardware import hardware_of
        from depthmix.parallel.plan import ParallelPlan

        found = estimate(self.config(), ParallelPlan(dp=gpus), hardware_of(hardware))
        return STEPS * found.step / 3600 if found.fits else None


CELLS = [
    Cell(size, row, losses[place])
    for place, size in enumerate("SML")
    for row, (_, losses) in ROWS.items()
    if losses[place] is not None
]


def line(cell: Cell) -> str:
    """The cell's row of the listing."""
    from depthmix.info import describe

    parameters = describe(cell.config())["parameters"]["total"]
    hours = ["does not fit" if h is None else f"{h:.1f}" for h in (cell.hours(1), cell.hours(8))]
    return f"| `{cell.name}` | {parameters:,} | {cell.losses} | {hours[0]} | {hours[1]} |"


def commands() -> str:
    """The commands of all cells, on 1 and on 8 GPUs."""
    lines = []
    for gpus in (1, 8):
        lines += [
            "",
            f"On {gpus} GPU{'s' * (gpus > 1)}:",
            "",
            "```sh",
            *(c.command(gpus) for c in CELLS),
            "```",
        ]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The listing: a table and the commands."""
    head = [
        "| cell | parameters | paper: train / validation | estimated hours, 1 H100 | 8 H100 |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(line, CELLS)]) + "\n" + commands()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cell", nargs="?", choices=[cell.name for cell in CELLS], metavar="CELL")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.markdown:
        print(markdown(), end="")
    elif given.cell:
        print(next(cell for cell in CELLS if cell.name == given.cell).command(given.gpus))
    else:
        print(PREPARE)
        for cell in CELLS:
            hours = (cell.hours(1), cell.hours(8))
            shown = ["    –" if h is None else f"{h:5.1f}" for h in hours]
            print(f"{cell.name:<22} {cell.losses}   {shown[0]} h on 1 H100, {shown[1]} h on 8 (estimates)")
