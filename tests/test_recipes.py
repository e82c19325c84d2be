"""Every recipe parses, and is what the specification says of its cell."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from depthmix import cli
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.shape import Shape

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
_spec = importlib.util.spec_from_file_location("table1", ROOT / "recipes/table1.py")
table1 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table1)

# Appendix B: blocks, D, heads, AdamW, Muon, parameters in billions.
SIZES = {
    "S": (12, 768, 6, 3e-3, 1e-2, 0.12),
    "M": (24, 1024, 8, 2e-3, 6e-3, 0.35),
    "L": (36, 1280, 10, 1e-3, 4e-3, 0.77),
}
# Table 1: the connection of each row and its option.
ROWS = {
    "prenorm": ("prenorm", {}),
    "mhc-lite-n4": ("mhc-lite", {"n_streams": 4}),
    "attnres-block-N4": ("attnres-block", {"blocks": 4}),
    "attnres-block-N8": ("attnres-block", {"blocks": 8}),
    "attnres": ("attnres", {}),
    "mgr-independent-n4": ("mgr-independent", {"n_streams": 4}),
    "mgr-competitive-n4": ("mgr-competitive", {"n_streams": 4}),
    "mgr-independent-n8": ("mgr-independent", {"n_streams": 8}),
    "mgr-competitive-n8": ("mgr-competitive", {"n_streams": 8}),
}


class Parsed(Exception):
    pass


@pytest.fixture
def parse(monkeypatch):
    """The configuration and folder that a command line would train."""

    def stop(config, run_dir, **options):
        raise Parsed(config, run_dir)

    monkeypatch.setattr("depthmix.train.train", stop)

    def run(words):
        with pytest.raises(Parsed) as caught:
            cli.main(words)
        return caught.value.args

    return run


def test_the_cells_are_those_of_the_paper():
    wanted = {f"{size}/{row}" for size in SIZES for row in ROWS} - {"L/mhc-lite-n4"}
    assert [cell.name for cell in table1.CELLS] == sorted({c.name for c in table1.CELLS}, key=table1_order)
    assert {cell.name for cell in table1.CELLS} == wanted and len(table1.CELLS) == 26


def table1_order(name):
    size, row = name.split("/")
    return "SML".index(size), [*ROWS].index(row)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("cell", table1.CELLS, ids=lambda cell: cell.name)
def test_command(cell, gpus, parse):
    words = shlex.split(cell.command(gpus))
    launcher = ["depthmix"] if gpus == 1 else ["torchrun", f"--nproc-per-node={gpus}", "-m", "depthmix"]
    assert words[: len(launcher)] == launcher
    config, folder = parse(words[len(launcher) :])
    blocks, width, heads, lr, muon_lr, billions = SIZES[cell.size]
    model, optim = config.model, config.optim
    assert (model.n_layer, model.d_model, model.n_head) == (blocks, width, heads)
    assert (model.seq_len, config.batch_size, config.steps) == (1024, 512, 20_000)
    assert config.steps * config.tokens_per_step == 10_485_760_000
    assert (optim.lr, optim.muon_lr, optim.warmup_steps) == (lr, muon_lr, 200)
    assert (optim.weight_decay, optim.beta1, optim.beta2, optim.muon_momentum) == (0.1, 0.9, 0.95, 0.95)
    assert (optim.grad_clip, optim.min_lr_fraction) == (1.0, 0.1)
    assert config.data.data == ("shards/fineweb",) and config.data.tokenizer == "gpt2"
    residual, options = ROWS[cell.row]
    given = {"n_streams": model.n_streams, **model.residual_options}
    assert model.residual == residual and {key: given[key] for key in options} == options
    # Billions as the paper rounds them, to two digits, what the connection adds aside.
    assert round(Shape.of(model).parameters / 1e9, 2) == billions
    assert model == cell.config().model
    plan = ParallelPlan.parse(config.parallel)
    assert (plan.processes if config.parallel else 1) == gpus
    assert folder == Path(f"runs/table1/{cell.size}-{cell.row}")


def test_every_run_has_a_folder_of_its_own():
    for gpus in (1, 8):
        commands = [shlex.split(cell.command(gpus)) for cell in table1.CELLS]
        assert len({words[words.index("--out") + 1] for words in commands}) == len(commands)


def test_the_page_is_what_the_script_prints():
    """All commands, and the numbers of two cells; to price all takes half a minute."""
    assert PAGE.endswith(table1.commands()) and table1.PREPARE in PAGE
    for cell in table1.CELLS:
        if cell.name in ("S/prenorm", "M/mgr-competitive-n4"):
            assert table1.line(cell) in PAGE.splitlines()
    found = re.findall(r"^\| `(.*)` \| [\d,]+ \| (.*) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
    assert [(name, losses) for name, losses, *_ in found] == [
        (cell.name, cell.losses) for cell in table1.CELLS
    ]
    assert all(5 < float(one) / float(eight) <= 8.5 for *_, one, eight in found)


def test_the_script_prints_a_command():
    import subprocess
    import sys

    ran = subprocess.run(
        [sys.executable, str(ROOT / "recipes/table1.py"), "M/mgr-competitive-n8", "--gpus", "8"],
        capture_output=True, text=True,
    )  # fmt: skip
    cell = next(cell for cell in table1.CELLS if cell.name == "M/mgr-competitive-n8")
    assert ran.stdout.strip() == cell.command(8)


def test_the_data_command_parses(monkeypatch):
    from depthmix.data import stream

    class Seen(Exception):
        pass

    def stop(config, out, **options):
        raise Seen(config, out)

    monkeypatch.setattr(stream, "prepare_stream", stop)
    with pytest.raises(Seen) as caught:
        cli.main(shlex.split(table1.PREPARE)[1:])
    config, out = caught.value.args
    assert (config.source, config.subset) == (("HuggingFaceFW/fineweb",), "sample-10BT")
    assert (config.tokens, config.tokenizer, out) == (10_000_000_000, "gpt2", Path("shards/fineweb"))
