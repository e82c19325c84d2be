"""How far the cost model of parallel plans (depthmix.parallel.cost) is from trainings that run here.

python benchmarks/plan_validation.py --out results/parallel/plan-validation.json

Five plans, one after the other: 1 process, dp=2, fsdp=2, tp=2, pp=2, each process with one thread, gloo between them.
In the processes of a plan small operations and trainings take turns for a number of rounds:

* *constants*: matrix products, an element-wise pass, attention, an all-reduce, the steps of every connection alone (no
  sublayers), and two trainings so small (D = 16) that they show what a block and a step cost whatever their size;
* *runs*: trainings of three sizes with four connections, forward, backward, clipping, optimiser.

The median of each constant makes a ``Hardware``, the model predicts each run from it, and the run's median is what it
is compared with. No constant is fitted to a run.

Everything is timed twice. *Clock*: between two barriers. *Processor*: seconds that the busiest process was computing,
which other work on the machine hardly changes; it holds no waiting, so it is compared with the predicted step without
its bubble. Where more processes want to run than there are cores, the clock measures the others too. Memory: bytes of
parameters and optimiser state that a process holds, and (1 process) of tensors kept for the backward pass, counted.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

PLANS = ("", "dp=2", "fsdp=2", "tp=2", "pp=2")
RESIDUALS = ("prenorm", "mgr-competitive", "attnres", "hc")
SIZES = ((64, 8), (128, 4), (256, 2))
"""Width and blocks."""
TINY = ((16, 2), (16, 6))
SEQUENCES, LENGTH, VOCAB = 4, 128, 320
TOKENS = SEQUENCES * LENGTH
TRUNK = (128, 8)
"""Width and blocks of the connections measured alone."""


def config_of(width: int, blocks: int, residual: str, plan: str, length: int = LENGTH):
    from depthmix.config import GPTConfig, OptimConfig, TrainConfig

    heads = max(2, width // 32)
    model = GPTConfig(VOCAB if length == LENGTH else 64, blocks, width, heads, length, residual=residual)
    return TrainConfig(
        model=model, optim=OptimConfig(warmup_steps=5), batch_size=SEQUENCES, parallel=plan, device="cpu",
        micro_batch=1 if plan.startswith("pp") else 0,
    )  # fmt: skip


def cases(plan: str) -> dict:
    found = {f"tiny {b} blocks": config_of(w, b, "prenorm", plan, 8) for w, b in TINY}
    for width, blocks in SIZES:
        for residual in RESIDUALS:
            found[f"{residual} D={width} blocks={blocks}"] = config_of(width, blocks, residual, plan)
    return found


# --- in the processes of a plan -------------------------------------------------------------------


class Constants:
    """Functions that do some work; each is timed in every round."""

    def __init__(self, many: bool):
        import torch

        self.work = {}
        for width in (16, 64, 128, 256):
            x = torch.randn(TOKENS, width, requires_grad=True)
            weight = torch.randn(4 * width, width, requires_grad=True)
            gradient = torch.randn(TOKENS, 4 * width)
            self.work[f"matmul {width}"] = lambda x=x, w=weight, g=gradient: torch.autograd.grad(
                torch.nn.functional.linear(x, w), (x, w), g
            )
        self._attention(torch)
        self._passes(torch)
        for residual in RESIDUALS:
            for tokens in (8, TOKENS):
                self.work[f"trunk {residual} {tokens}"] = self._trunk(torch, residual, tokens)
        if many:
            import torch.distributed as dist

            for size in (2, 2**18):
                values = torch.ones(size)
                self.work[f"all-reduce {size}"] = lambda v=values: dist.all_reduce(v)

    def _attention(self, torch):
        q, k, v = (torch.randn(SEQUENCES, 4, LENGTH, 32, requires_grad=True) for _ in range(3))
        gradient = torch.randn_like(q)

        def attention():
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), gradient)

        self.work["attention 128"] = attention

    def _passes(self, torch):
        from depthmix.functional import relu_squared

        x = torch.randn(TOKENS, 512, requires_grad=True)
        gradient = torch.randn(TOKENS, 512)
        self.work["pass 512"] = lambda: torch.autograd.grad(relu_squared(x), x, gradient)

    def _trunk(self, torch, residual: str, tokens: int):
        from depthmix import GPT
        from depthmix.model import step_and_norm

        width, blocks = TRUNK
        model = GPT(config_of(width, blocks, residual, "").model, seed=0)
        sites = [s for b in model.blocks for s in (b.attn_site, b.mlp_site)]
        norms = [n for b in model.blocks for n in (b.mlp.norm, b.attn.norm)]
        outputs = [torch.randn(1, tokens, width, requires_grad=True) for _ in sites]
        gradients = [torch.randn(1, tokens, width) for _ in sites]
        embedding = torch.randn(1, tokens, width, requires_grad=True)

        def run():
            h, state = model.residual.begin(embedding)
            state = model.residual.foresee(state, sites)
            inputs = []
            for site, y, norm in zip(sites, outputs, norms, strict=True):
                h, state = step_and_norm(site, y, state, norm)
                inputs.append(h)
            torch.autograd.grad(inputs, [embedding, *outputs], gradients, allow_unused=True)

        return run


def worker(plan_text: str, rounds: int, seconds: float, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from depthmix import GPT
    from depthmix.memory import saved_bytes
    from depthmix.parallel.engine import build_engine
    from depthmix.parallel.plan import ParallelPlan
    from depthmix.parallel.world import ManyProcesses, World

    plan = ParallelPlan.parse(plan_text)
    many = plan.processes > 1
    world = ManyProcesses(plan, "cpu", timeout_s=300) if many else World()
    engines, counted = {}, {}
    for name, config in cases(plan_text).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = build_engine(
                lambda cuts, c=config: GPT(c.model, seed=0, cuts=cuts), config, world, torch.device("cpu")
            )
        tokens = torch.randint(0, config.model.vocab_size, (SEQUENCES, config.model.seq_len + 1))
        tokens = world.same(tokens)
        mine = tokens[world.data_rank * engine.rows :][: engine.rows]
        engines[name] = engine, mine
        counted[name] = _held(engine)
        if not many:
            counted[name]["kept"] = saved_bytes(engine.model, mine[:, :-1], mine[:, 1:])

    def step(engine, mine):
        engine.optimizer.zero_grad()
        engine.backward(mine[:, :-1], mine[:, 1:])
        engine.optimizer.clip_grad_norm(1.0)
        engine.optimizer.step()

    constants = Constants(many).work
    work = {**constants, **{name: (lambda pair=pair: step(*pair)) for name, pair in engines.items()}}
    taken = {kind: {name: [] for name in work} for kind in ("clock", "processor")}
    began = time.monotonic()
    done = 0
    for round_ in range(-1, rounds):
        if world.any(round_ >= 3 and time.monotonic() - began > seconds):
            break
        for name, function in work.items():
            if many:
                torch.distributed.barrier()
            start, busy = time.perf_counter(), time.process_time()
            repeats = 5 if name in constants else 1
            for _ in range(repeats):
                function()
            busy = time.process_time() - busy
            if many:
                torch.distributed.barrier()
            if round_ >= 0:
                taken["clock"][name].append((time.perf_counter() - start) / repeats)
                taken["processor"][name].append(busy / repeats)
        done += round_ >= 0
    all_ = [(counted, taken)]
    if many:
        all_ = [None] * plan.processes
        torch.distributed.all_gather_object(all_, (counted, taken))
    if world.first:
        busiest = {name: max((t["processor"][name] for _, t in all_), key=statistics.median) for name in work}
        values = {
            "rounds": done,
            "seconds": {"clock": taken["clock"], "processor": busiest},
            "held": {name: [held[name] for held, _ in all_] for name in counted},
        }
        out.write_text(json.dumps(values))
    if many:
        world.close()


def _held(engine) -> dict:
    """Bytes of parameters and of the optimiser's state in this process."""

    def size(x):
        x = x.to_local() if hasattr(x, "to_local") else x
        return x.numel() * x.element_size()

    state = engine.optimizer.named_state()
    return {
        "parameters": sum(size(p) for p in {p for part in engine.parts for p in part.parameters()}),
        "optimizer": sum(size(x) for x in state.values() if x.dim()),
    }


# --- from times to predictions --------------------------------------------------------------------


def medians(taken: dict) -> dict:
    return {name: statistics.median(values) for name, values in taken.items()}


def hardware_from(plan_text: str, seconds: dict):
    """The machine as the constants of a plan's processes show it. ``seconds``: medians."""
    from depthmix.parallel.cost import connection_traffic, estimate
    from depthmix.parallel.hardware import Hardware
    from depthmix.parallel.plan import ParallelPlan

    plan = ParallelPlan.parse(plan_text)
    matmul = tuple((w, 6 * TOKENS * 4 * w * w / seconds[f"matmul {w}"]) for w in (16, 64, 128, 256))
    bandwidth = TOKENS * 512 * 5 * 4 / seconds["pass 512"]
    shares, overheads = {}, {}
    width, blocks = TRUNK
    for residual in RESIDUALS:
        few, all_ = seconds[f"trunk {residual} 8"], seconds[f"trunk {residual} {TOKENS}"]
        # No share above 4: what is less is lost in noise.
        model = config_of(width, blocks, residual, "").model
        moved = sum(sum(connection_traffic(model, s)) for s in range(1, 2 * blocks + 1)) * width * 4
        slope = max(moved / bandwidth / 4, (all_ - few) / (TOKENS - 8))
        shares[residual] = moved / slope / bandwidth
        overheads[residual] = max(0.0, few - 8 * slope) / (2 * blocks)
    # PreNorm's own is in the cost of a block.
    base = overheads["prenorm"]
    overheads = {name: max(0.0, value - base) for name, value in overheads.items()}
    band, latency = 1e12, 0.0
    if plan.processes > 1:
        latency = seconds["all-reduce 2"]
        band = 2**18 * 4 / max(1e-9, seconds[f"all-reduce {2**18}"] - latency)
    bare = Hardware(
        name=f"measured, {plan}", matmul=matmul,
        attention_flops=3.5 * 4 * 128 * (LENGTH + 1) / 2 * TOKENS / seconds["attention 128"],
        bandwidth=bandwidth, connection_share={"": shares["prenorm"], **shares}, intra_bandwidth=band,
        inter_bandwidth=band, intra_latency=latency, inter_latency=latency, memory=8e9, devices_per_node=8,
        connection_overhead={"": 0.0, **overheads}, overlap={},
        source="measured by benchmarks/plan_validation.py, one thread a process; overlap assumed to be none",
    )  # fmt: skip
    # Two unknowns, seconds a block and seconds a step, from two trainings that hardly compute.
    rows = []
    for _, count in TINY:
        config = config_of(16, count, "prenorm", plan_text, 8)
        none = estimate(config, plan, bare).step
        one = estimate(config, plan, dataclasses.replace(bare, block_overhead=1.0)).step - none
        rows.append((one, seconds[f"tiny {count} blocks"] - none))
    (a1, t1), (a2, t2) = rows
    block = max(0.0, (t2 - t1) / (a2 - a1))
    return dataclasses.replace(bare, block_overhead=block, step_overhead=max(0.0, t1 - a1 * block))


def predict(plan_text: str, hardware) -> dict:
    """Estimates of the runs, by name."""
    from depthmix.parallel.cost import estimate
    from depthmix.parallel.plan import ParallelPlan

    plan = ParallelPlan.parse(plan_text)
    return {name: estimate(c, plan, hardware) for name, c in cases(plan_text).items() if "tiny" not in name}


def compare(plan_text: str, found: dict) -> dict:
    """The record of a plan: constants, and every run as predicted and as measured, by either time."""
    seconds = {kind: medians(taken) for kind, taken in found["seconds"].items()}
    hardware = {kind: hardware_from(plan_text, each) for kind, each in seconds.items()}
    predicted = {kind: predict(plan_text, each) for kind, each in hardware.items()}
    runs = []
    for name, expected in predicted["clock"].items():
        held = found["held"][name]
        most = max(held, key=lambda h: sum(h.values()))
        run = {"name": name}
        for kind in KINDS:
            measured = seconds[kind][name]
            one = time_of(kind, predicted[kind][name])
            values = found["seconds"][kind][name]
            run[kind] = {
                "predicted_s": one, "measured_s": measured, "error": one / measured - 1,
                "least_s": min(values), "most_s": max(values),
            }  # fmt: skip
        run["bytes"] = {
            kind: {"predicted": expected.memory[kind], "measured": most[kind]}
            for kind in ("parameters", "optimizer")
        }
        if "kept" in most:
            # Without what the loss needs for a moment.
            kept = expected.memory["activations"] - TOKENS * VOCAB * 8
            run["bytes"]["kept for backward"] = {"predicted": kept, "measured": most["kept"]}
        runs.append(run)
    return {
        "plan": plan_text or "1 process", "rounds": found["rounds"],
        "hardware": {kind: each.to_dict() for kind, each in hardware.items()},
        "constants_s": {k: {n: t for n, t in each.items() if "D=" not in n} for k, each in seconds.items()},
        "runs": runs,
    }  # fmt: skip


KINDS = ("clock", "processor")


def time_of(kind: str, expected) -> float:
    """Seconds of an estimate that ``kind`` measures."""
    return expected.step - (expected.bubble if kind == "processor" else 0.0)


def ratios(plans: list[dict]) -> list[dict]:
    """Over PreNorm's run of the same plan and size, which is what a comparison of connections asks for."""
    found = []
    for plan in plans:
        by_name = {run["name"]: run for run in plan["runs"]}
        for name, run in by_name.items():
            residual, _, size = name.partition(" ")
            base = by_name[f"prenorm {size}"]
            if residual != "prenorm":
                row = {"plan": plan["plan"], "name": name}
                for kind in KINDS:
                    predicted, measured = (
                        run[kind][k] / base[kind][k] for k in ("predicted_s", "measured_s")
                    )
                    row[kind] = {
                        "predicted": predicted,
                        "measured": measured,
                        "error": predicted / measured - 1,
                    }
                found.append(row)
    return found


def summary(plans: list[dict]) -> dict:
    """Medians of absolute relative errors, and the largest."""

    def middle(values):
        return statistics.median(abs(v) for v in values)

    over, found = ratios(plans), {}
    for kind in KINDS:
        errors = {p["plan"]: [r[kind]["error"] for r in p["runs"]] for p in plans}
        every = [error for each in errors.values() for error in each]
        found[kind] = {
            "median_error": middle(every),
            "largest_error": max(every, key=abs),
            "median_error_by_plan": {plan: middle(each) for plan, each in errors.items()},
            "median_error_of_ratio_to_prenorm": middle(r[kind]["error"] for r in over),
        }
    counted = [
        (k, b["predicted"] / b["measured"] - 1)
        for p in plans
        for r in p["runs"]
        for k, b in r["bytes"].items()
    ]
    held = [error for k, error in counted if not k.startswith("kept")]
    kept = [error for k, error in counted if k.startswith("kept")]
    found["bytes"] = {
        "largest_error_of_parameters_and_optimizer": max(held, key=abs),
        "median_error_of_kept_for_backward": middle(kept),
        "largest_error_of_kept_for_backward": max(kept, key=abs),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", default="results/parallel/plan-validation.json", help="the file")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, at most")
    parser.add_argument(
        "--seconds", type=float, default=120, help="of a plan; at least three rounds are made"
    )
    parser.add_argument("--again", action="store_true", help="predict again from the constants in the file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], args.rounds, args.seconds, Path(args.worker[1]))

    if args.again:
        record = again(Path(args.out))
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
        for plan in record["plans"]:
            _print(plan)
        print(json.dumps(record["summary"], indent=2))
        return None

    import tempfile

    import torch

    from depthmix.bench.machine import machine

    plans = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for plan in PLANS:
            out = Path(folder, "times.json")
            command = [
                __file__, "--rounds", str(args.rounds), "--seconds", str(args.seconds), "--worker", plan, str(out)
            ]  # fmt: skip
            launch = [sys.executable]
            if plan:
                launch += ["-m", "torch.distributed.run", "--nproc-per-node=2"]
                launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            subprocess.run([*launch, *command], check=True, env=environment, timeout=600 + 10 * args.seconds)
            plans.append(compare(plan, json.loads(out.read_text())))
            _print(plans[-1])
            _write(args, plans, machine(torch.device("cpu")))
    print(json.dumps(summary(plans), indent=2))


def again(path: Path) -> dict:
    """The record at ``path`` with predictions made again from its constants."""
    record = json.loads(path.read_text())
    for plan in record["plans"]:
        text = "" if plan["plan"] == "1 process" else plan["plan"]
        for kind in KINDS:
            hardware = hardware_from(text, plan["constants_s"][kind])
            plan["hardware"][kind] = hardware.to_dict()
            predicted = predict(text, hardware)
            for run in plan["runs"]:
                one, expected = run[kind], predicted[run["name"]]
                one["predicted_s"] = time_of(kind, expected)
                one["error"] = one["predicted_s"] / one["measured_s"] - 1
                for part in ("parameters", "optimizer"):
                    run["bytes"][part]["predicted"] = expected.memory[part]
                if "kept for backward" in run["bytes"]:
                    kept = expected.memory["activations"] - TOKENS * VOCAB * 8
                    run["bytes"]["kept for backward"]["predicted"] = kept
    record["summary"] = summary(record["plans"])
    record["ratios_to_prenorm"] = ratios(record["plans"])
    return record


def _write(args, plans: list[dict], described: dict) -> None:
    described["threads"] = 1
    values = {
        "format": 1,
        "command": "python " + " ".join(sys.argv),
        "note": "Constants and runs took turns and every figure is a median over the rounds.",
        "load_average": os.getloadavg(),
        "machine": described,
        "tokens": TOKENS,
        "summary": summary(plans),
        "plans": plans,
        "ratios_to_prenorm": ratios(plans),
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(values, indent=1) + "\n")


def _print(plan: dict) -> None:
    print(
        f"\n{plan['plan']}, {plan['rounds']} rounds; milliseconds predicted / measured, error: clock, processor"
    )
    for run in plan["runs"]:
        times = (
            f"{1e3 * run[k]['predicted_s']:9.1f} /{1e3 * run[k]['measured_s']:9.1f} {run[k]['error']:+6.0%}"
            for k in KINDS
        )
        print(f"  {run['name']:34}", "   ".join(times), flush=True)


if __name__ == "__main__":
    main()
