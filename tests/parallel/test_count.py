"""What processes do send is what the formulas say, to the byte; and what sockets carry is what was counted."""

import json
import sys
from pathlib import Path

import pytest

from depthmix import available_residuals, cli
from depthmix.comm_command import make_case, run_cases
from depthmix.parallel.count import by_key
from depthmix.parallel.plan import ParallelPlan
from depthmix.parallel.volume import process_volume, wire_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

import warm

TIMEOUT_S = 600
CUT = "pp=2,schedule=interleaved,stages=4"


def cases_of_two():
    """Every connection over cuts with the cache, and over the sequence; a few in other ways."""
    cases = [make_case(name, 8, 3, CUT) for name in available_residuals()]
    cases += [
        make_case(name, 4, 3, "tp=2") for name in ("prenorm", "mgr-competitive", "mhc", "attnres", "moda")
    ]
    cases += [make_case("mgr-review", 4, 2, plan, "bf16") for plan in ("dp=2", "fsdp=2,unit=0", "pp=2")]
    # Of 8 small blocks, four units of two.
    cases += [make_case("mgr-competitive", 16, 2, "fsdp=2,unit=1", d_model=128)]
    cases += [
        make_case(name, 4, 2, plan, "autocast") for name in ("siamese", "moda") for plan in ("tp=2", "pp=2")
    ]
    return cases


def cases_of_four():
    """Axes together, where traffic of one goes on within the other."""
    plans = (
        "dp=2,fsdp=2,unit=0", "fsdp=2,tp=2,unit=0", "dp=2,tp=2", "dp=2,pp=2", "fsdp=2,pp=2,unit=0", "fsdp=2,pp=2",
        "tp=2,pp=2", "pp=4", "fsdp=4", "dp=4",
    )  # fmt: skip
    return [make_case("mgr-competitive", 10, 3, plan) for plan in plans]


def differences(config, ranks):
    plan = ParallelPlan.parse(config.parallel)
    found = []
    for rank, counted in enumerate(ranks):
        ours = by_key(process_volume(config, plan, rank), plan)
        theirs = {tuple(row[:5]): row[5:] for row in counted["sent"]}
        for key in ours.keys() | theirs.keys():
            if ours.get(key) != theirs.get(key):
                found.append(
                    (config.model.residual, config.parallel, rank, key, ours.get(key), theirs.get(key))
                )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes, cases", [(2, cases_of_two), (4, cases_of_four)])
def test_counted_is_what_the_formulas_say(tmp_path, processes, cases):
    configs = cases()
    given, out = tmp_path / "cases.json", tmp_path / "out.json"
    given.write_text(json.dumps([{"config": config.to_dict()} for config in configs]))
    for ended in warm.torchrun(["-m", "depthmix.parallel.count", given, out], processes, timeout=TIMEOUT_S):
        assert ended.returncode == 0, ended.stderr[-4000:]
    results = json.loads(out.read_text())
    assert len(results) == len(configs)
    kinds = {row[0] for ranks in results for rank in ranks for row in rank["sent"]}
    assert {"all-gather", "reduce-scatter", "all-reduce", "point-to-point"} <= kinds
    for config, ranks in zip(configs, results, strict=True):
        assert len(ranks) == processes
        assert differences(config, ranks) == []


@pytest.mark.slow
def test_sockets_carry_what_was_counted():
    """No traffic escapes the count: the operating system was given what rings need for it, and little more."""
    configs = [make_case("mgr-competitive", 8, 4, plan, d_model=128) for plan in ("pp=2", "dp=2", "fsdp=2")]
    for config, ranks in zip(configs, run_cases(configs, 2, TIMEOUT_S), strict=True):
        plan = ParallelPlan.parse(config.parallel)
        rings = sum(wire_bytes(v, "gloo") for rank in range(2) for v in process_volume(config, plan, rank))
        carried = sum(rank["socket_bytes"] for rank in ranks)
        # Headers of messages, and the few words of a barrier.
        assert rings <= carried <= 1.05 * rings, (config.parallel, rings, carried)


def test_a_count_that_differs_fails(monkeypatch, tmp_path, capsys):
    """Exit status, mark and file of a run that sends something else than the formulas say."""
    from depthmix import comm_command

    def fake(cases, processes, timeout_s):
        rank = {"sent": [["all-reduce", "dp", "backward", None, "", 12, 1]], "socket_bytes": 34}
        return [[rank] * processes for _ in cases]

    monkeypatch.setattr(comm_command, "run_cases", fake)
    out = tmp_path / "comm.json"
    argv = ["comm", "--residuals", "prenorm", "--stages", "0", "--parallel", "dp=2", "--out", str(out)]
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert "12 ≠ " in said.out and "prenorm (dp=2)" in said.err
    (case,) = json.loads(out.read_text())["cases"]
    assert not case["equal"] and case["socket_bytes_of_all_processes"] == 68


def test_formulas_alone_run_nothing(monkeypatch, tmp_path, capsys):
    from depthmix import comm_command

    monkeypatch.setattr(comm_command, "run_cases", None)
    out, plot = tmp_path / "comm.json", tmp_path / "comm.png"
    argv = [
        "comm",
        "--formulas",
        "--residuals",
        "prenorm,mgr-competitive",
        "--stages",
        "4",
        "--n-streams",
        "2,3",
    ]
    assert cli.main([*argv, "--out", str(out), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    cases = json.loads(out.read_text())["cases"]
    streams = {(case["residual"], case["n_streams"]) for case in cases}
    assert streams == {("prenorm", None), ("mgr-competitive", 2), ("mgr-competitive", 3)}
    pipeline = next(c for c in cases if c["parallel"].startswith("pp=4") and c["n_streams"] == 3)
    assert pipeline["boundary_numbers_per_token"] == [48, 48, 48]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stages", "1"], "--stages 1"),
        (["--stages", "0", "--parallel", "dp=1"], "one process"),
        (["--sublayers", "7"], "even"),
        (["--n-streams", "x"], "--n-streams"),
        (["--parallel", "dq=2"], "dp"),
        (["--residuals", "prenom"], "prenorm"),
        (["--out", "x.txt"], ".json"),
        (["--stages", "8", "--sublayers", "4", "--parallel", "pp=8"], "blocks"),
    ],
)
def test_wrong_requests(argv, words, capsys):
    assert cli.main(["comm", *argv]) == 2
    assert words in capsys.readouterr().err
