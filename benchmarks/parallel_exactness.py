"""How far training on many processes is from training on one: losses and weights after 20 steps, fp32.

Each connection with each plan, against one process on the same micro-batches; written after every connection, and what
is in the file already is not run again. ``rounding`` is how far one process is from itself when it sums micro-batches
in another order (micro-batches of 2 sequences in place of 1): what rounding alone does.

    python benchmarks/parallel_exactness.py --out results/parallel/exactness.json
"""

import argparse
import functools
import importlib.util
import json
from pathlib import Path

from depthmix.checkpoint import versions, write_json

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("parallel_steps", ROOT / "tests/parallel/steps.py")
steps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(steps)

NAMES = (
    "prenorm", "mgr-independent", "mgr-competitive", "attnres", "attnres-block:blocks=3", "hc", "mhc", "mhc-lite",
)  # fmt: skip
PLANS = (
    "dp=4", "fsdp=4,unit=0", "dp=2,fsdp=2,unit=0", "tp=2,dp=2,unit=0", "tp=2,fsdp=2,unit=0", "tp=4",
    "pp=4,schedule=gpipe", "pp=4", "pp=2,schedule=interleaved,stages=4,dp=2", "pp=2,schedule=gpipe,fsdp=2",
    "pp=2,fsdp=2,unit=0", "pp=2,schedule=interleaved,stages=4,fsdp=2,unit=0", "pp=2,tp=2",
    "pp=2,schedule=interleaved,stages=4,tp=2", "fsdp=4",
)  # fmt: skip
MEMORY = ({"stream_memory": "store"}, {"stream_memory": "inversion"})


def cases_of(name: str) -> dict[str, dict]:
    """Case by label."""
    cases = {plan: {"parallel": plan, "model": {"residual": name}} for plan in PLANS}
    for plan in ("tp=2,fsdp=2,unit=0", "pp=2,schedule=interleaved,stages=4,fsdp=2,unit=0"):
        cases[f"{plan} checkpointing"] = {**cases[plan], "run": {"activation_checkpointing": True}}
        for memory in MEMORY if name.startswith("mgr") else ():
            label = f"{plan} {memory['stream_memory']}"
            cases[label] = {"parallel": plan, "model": {"residual": name, **memory}}
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/parallel/exactness.json")
    out = parser.parse_args().out
    results = json.loads(out.read_text()) if out.exists() else {"connections": {}}
    results |= {
        "steps": steps.STEPS,
        "versions": versions(),
        "model": steps.make_config({}).to_dict()["model"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if name in results["connections"]:
            continue
        cases = cases_of(name)
        found = steps.run_many(cases, 4, functools.partial(steps.torchrun, timeout_s=3600))
        truth = steps.run_alone({"model": {"residual": name}})
        again = steps.run_alone({"model": {"residual": name}, "run": {"micro_batch": 2}})
        results["connections"][name] = {
            "rounding": steps.differences(again, truth),
            "plans": {label: steps.differences(result, truth) for label, result in found.items()},
        }
        write_json(out, results)
        worst = max(results["connections"][name]["plans"].values(), key=lambda off: off["weights"])
        print(
            f"{name}: largest difference of losses and weights over {len(cases)} plans: {worst}", flush=True
        )


if __name__ == "__main__":
    main()
