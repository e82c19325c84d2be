"""Check every candidate of a problem, then time the right ones in turns.

**The rule.** Outputs and gradients are compared with those of the reference in float64, tensor by tensor; the error
of a tensor is its largest difference over the largest value of the truth. It may be twice the error of the reference
run in the problem's own dtype, plus a floor for where that happens to be exact: 2^-20 (eight roundings of fp32), and
for bf16 and fp16 a quarter of a unit in the last place of the largest value. A candidate with a larger error, or with
a value that is not finite, is wrong: it gets no time.

Gradients of parameters are sums over M vectors (tokens times streams or sources), which fp32 gives to about
2^-24 sqrt(M) whatever their order: that is added to their floor. One token left out would show as 1 / sqrt(M). Some
are few numbers (biases, scales), whose errors are single draws: half a unit is their floor for bf16 and fp16, and
where a case has one such gradient for each of several steps, the reference's error is the largest of them.

**Times.** Each turn runs every candidate once, forward with gradients recorded and then backward, so that a machine
that slows down slows all of them, and copies the streams once and a buffer far beyond the caches, for the same reason.
Figures are medians and quartiles over turns; ratios are taken turn by turn. On a
GPU times are those of events on the stream, one more turn comes first, and before each run the cache is filled with
something else.
"""

import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .case import Adapted, Peer, Problem, Tensors, leaf
from .machine import Copy, installed_version

KERNELS = ("auto", "torch", "native", "triton")
"""Backends of depthmix: ``auto`` is what it chooses by itself."""
MODES = ("forward", "backward", "both")
FLUSH_BYTES = 2**30
"""Far beyond a GPU's cache, and long enough to write that the first kernels are queued by then."""
FEWEST_TURNS = 3
CHUNK_ELEMENTS = 2**24
"""Elements of the largest input that the float64 reference takes at once."""


@contextmanager
def using(kernels: str | None):
    """depthmix's backend inside, by the variable it reads at every call; ``None`` changes nothing."""
    before = os.environ.get("DEPTHMIX_KERNELS")
    if kernels is not None:
        os.environ.pop("DEPTHMIX_KERNELS", None)
        if kernels != "auto":
            os.environ["DEPTHMIX_KERNELS"] = kernels
    try:
        yield
    finally:
        os.environ.pop("DEPTHMIX_KERNELS", None)
        if before is not None:
            os.environ["DEPTHMIX_KERNELS"] = before


@dataclass
class Candidate:
    """One way to compute a problem, and what became of it."""

    name: str
    kind: str
    """``eager``, ``compile``, ``depthmix`` or ``peer``."""
    made: Adapted | None = None
    kernels: str | None = None
    version: str | None = None
    status: str = "waiting"
    """Then ``timed``, ``wrong``, ``failed``, ``not installed`` or ``cannot run``."""
    reason: str | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tensor -> error and what is allowed."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})

    def fail(self, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.status, self.reason = "failed", f"{type(error).__name__}: {lines[0]}"[:300]
        self.made = None


def candidates(problem: Problem, device: torch.device, kernels: tuple[str, ...], against) -> list[Candidate]:
    """All that take part, those that cannot included. The reference is first."""
    plain = Adapted(problem.inputs, problem.reference)
    found = [Candidate("eager", "eager", plain, version=torch.__version__)]
    if "compile" in against:
        torch._dynamo.reset()
        compiled = torch.compile(problem.reference, dynamic=False)
        found.append(
            Candidate("compile", "compile", Adapted(problem.inputs, compiled), version=torch.__version__)
        )
    for choice in kernels:
        name = "depthmix" if choice == "auto" else f"depthmix:{choice}"
        made = Adapted(problem.inputs, problem.function)
        found.append(Candidate(name, "depthmix", made, kernels=choice))
    if "peers" in against:
        found += [_peer(peer, device) for peer in problem.peers]
    return found


def _peer(peer: Peer, device: torch.device) -> Candidate:
    candidate = Candidate(peer.name, "peer", version=installed_version(peer.package))
    if candidate.version is None:
        candidate.status, candidate.reason = "not installed", f"pip install {peer.package}"
    elif peer.device is not None and peer.device != device.type:
        candidate.status, candidate.reason = "cannot run", f"on {peer.device} only"
    elif peer.refuses is not None:
        candidate.status, candidate.reason = "cannot run", peer.refuses
    else:
        try:
            candidate.made = peer.prepare()
        except Exception as error:  # whatever another package raises
            candidate.fail(error)
    return candidate


# --- the check ----------------------------------------------------------------------------------


def _gradients(outputs: Tensors, leaves: Tensors, upstream: Tensors) -> Tensors:
    names = [k for k in outputs if outputs[k].requires_grad]
    given = torch.autograd.grad(
        [outputs[k] for k in names],
        list(leaves.values()),
        [upstream[k] for k in names],
        allow_unused=True,
    )
    return dict(zip(leaves, given, strict=True))


def upstream_gradients(problem: Problem) -> Tensors:
    """Normal numbers in the shape of every output, the same for all candidates."""
    with torch.no_grad():
        shapes = {k: y.shape for k, y in problem.reference(_cut(problem, 0, 1)).items()}
    some = next(x for k, x in problem.inputs.items() if k not in problem.shared)
    generator = torch.Generator(some.device).manual_seed(99)
    return {
        k: torch.empty(some.shape[0], *shape[1:], dtype=some.dtype, device=some.device).normal_(
            generator=generator
        )
        for k, shape in shapes.items()
    }


def _cut(problem: Problem, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensors:
    return {
        k: leaf((x if k in problem.shared else x[start:stop]).to(dtype or x.dtype))
        for k, x in problem.inputs.items()
    }


def truth(problem: Problem, upstream: Tensors) -> Tensors:
    """Outputs and gradients (``d NAME``) of the reference in float64, computed some tokens at a time."""
    tokens = next(iter(upstream.values())).shape[0]
    largest = max(x.numel() for k, x in problem.inputs.items() if k not in problem.shared)
    chunk = max(1, min(tokens, tokens * CHUNK_ELEMENTS // max(1, largest)))
    parts: dict[str, list[Tensor]] = {}
    sums: Tensors = {}
    for start in range(0, tokens, chunk):
        x = _cut(problem, start, start + chunk, torch.float64)
        outputs = problem.reference(x)
        into = {k: g[start : start + chunk].double() for k, g in upstream.items()}
        for name, y in outputs.items():
            parts.setdefault(name, []).append(y.detach())
        for name, g in _gradients(outputs, x, into).items():
            if name in problem.shared:
                sums[f"d {name}"] = sums[f"d {name}"] + g if f"d {name}" in sums else g
            else:
                parts.setdefault(f"d {name}", []).append(g)
    return {name: torch.cat(pieces) for name, pieces in parts.items()} | sums


def result(candidate: Candidate, upstream: Tensors) -> Tensors:
    """Outputs and gradients (``d NAME``) of a candidate, in the case's names."""
    made = candidate.made
    assert made is not None, candidate.name
    with using(candidate.kernels):
        outputs = made.run(made.leaves)
        gradients = _gradients(outputs, made.leaves, upstream)
    found = {k: y.detach() for k, y in outputs.items()}
    return found | {f"d {k}": g for k, g in made.gradients(gradients).items()}


def tolerance_floor(dtype: torch.dtype, vectors: float = 0) -> float:
    """What is allowed beyond twice the reference's error (see the head of this file); ``vectors``: M, of a sum."""
    rounding = torch.finfo(dtype).eps / (2 if vectors else 4) if dtype.itemsize < 4 else 0.0
    return 2.0**-20 + rounding + 2.0**-24 * vectors**0.5


def difference(x: Tensor | None, exact: Tensor) -> float:
    """Largest difference over the largest value; infinite where a value is missing or not finite."""
    if x is None or x.shape != exact.shape:
        return float("inf")
    largest, scale = 0.0, exact.abs().max().item() if exact.numel() else 1.0
    # In pieces: a float64 copy of the whole would be as large as the truth again.
    step = max(1, x.shape[0] // 16) if x.dim() else 1
    pieces = zip(x.split(step), exact.split(step), strict=True) if x.dim() else [(x, exact)]
    for a, b in pieces:
        found = (a.double() - b).abs().max().item() if a.numel() else 0.0
        largest = found if not found <= largest else largest
        if largest != largest:
            return float("inf")
    return largest / scale if scale else largest


def check(
    candidate: Candidate,
    found: Tensors,
    exact: Tensors,
    reference: dict[str, float],
    sums: dict[str, float] | None = None,
) -> None:
    """Fill the candidate's errors; it is wrong where one is larger than allowed.

    ``reference``: the error of the reference in the same dtype, of every tensor. ``sums``: for tensors that are sums
    over vectors of many tokens, how many.
    """
    # Outputs all of them; gradients as far as the candidate's layout gives them.
    compared = [k for k in exact if not k.startswith("d ") or k in found]
    for name in compared:
        error = difference(found.get(name), exact[name])
        dtype = _dtype(found.get(name), exact[name])
        allowed = 2 * reference[name] + tolerance_floor(dtype, (sums or {}).get(name, 0))
        candidate.errors[name] = error, allowed
        if not error <= allowed:
            candidate.status = "wrong"
    if candidate.status == "wrong":
        name, (error, allowed) = max(candidate.errors.items(), key=lambda item: item[1][0] / item[1][1])
        candidate.reason = f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        candidate.made = None


def _dtype(found: Tensor | None, exact: Tensor) -> torch.dtype:
    return exact.dtype if found is None else found.dtype


def check_all(problem: Problem, competitors: list[Candidate], upstream: Tensors) -> None:
    """Run and judge all that can run; those that come out right are left waiting."""
    exact = truth(problem, upstream)
    eager, *others = competitors
    try:
        reference = {k: difference(x, exact[k]) for k, x in result(eager, upstream).items()}
    except Exception as error:  # out of memory, mostly
        _clear(error)
        eager.fail(error)
        for other in others:
            if other.status == "waiting":
                other.status, other.made = "cannot run", None
                other.reason = "not checked: the reference failed; fewer --tokens may help"
        return
    eager.errors = {k: (error, error) for k, error in reference.items()}
    per_token = sum(x.numel() for k, x in problem.inputs.items() if k not in problem.shared)
    sums = {f"d {k}": per_token / problem.width for k in problem.shared}
    reference |= _of_all_steps(reference, sums)
    for other in others:
        if other.status != "waiting":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = result(other, upstream)
            check(other, found, exact, reference, sums)
        except Exception as error:  # of another package, or of ours: listed, and the others go on
            _clear(error)
            other.fail(error)
    for candidate in competitors:
        if candidate.status == "waiting" and not all(e == e and e < float("inf") for e in reference.values()):
            candidate.status, candidate.made = "failed", None
            candidate.reason = "the reference itself is not finite"


def _of_all_steps(reference: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
    """Of each ``d NAME.k`` the largest error over k."""
    largest: dict[str, float] = {}
    for name in sums:
        stem = name.partition(".")[0]
        largest[stem] = max(largest.get(stem, 0.0), reference[name])
    return {name: largest[name.partition(".")[0]] for name in sums}


def _clear(error: BaseException) -> None:
    """Let go of what the failed run held on the device."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the clock ----------------------------------------------------------------------------------


class Clock:
    """Times a forward and a backward pass."""

    def __init__(self, device: torch.device, flush: bool):
        self.device = device
        cuda = device.type == "cuda"
        self.other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush and cuda else None

    def __call__(self, candidate: Candidate, upstream: Tensors) -> tuple[float, float]:
        made = candidate.made
        assert made is not None, candidate.name
        with using(candidate.kernels):
            if self.device.type != "cuda":
                began = time.perf_counter()
                outputs = made.run(made.leaves)
                between = time.perf_counter()
                _gradients(outputs, made.leaves, upstream)
                return between - began, time.perf_counter() - between
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            if self.other is not None:
                self.other.zero_()
            events[0].record()
            outputs = made.run(made.leaves)
            events[1].record()
            _gradients(outputs, made.leaves, upstream)
            events[2].record()
            torch.cuda.synchronize(self.device)
            return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3


def take_turns(
    competitors: list[Candidate],
    upstream: Tensors,
    clock: Clock,
    copies: tuple[Copy, ...],
    rounds: int,
    patience: float,
) -> int:
    """Fill the seconds of all that were found right; the check has warmed them up.

    Returns the number of turns: ``rounds``, or what took ``patience`` seconds, at least three.
    """
    running = [c for c in competitors if c.status == "waiting"]
    began = time.perf_counter()
    turns = 0
    for turn in range(0 if clock.device.type == "cpu" else -1, rounds):
        if turns >= FEWEST_TURNS and time.perf_counter() - began > patience:
            break
        turns = turn + 1
        for candidate in running:
            if candidate.status == "failed":
                continue
            try:
                forward, backward = clock(candidate, upstream)
            except Exception as error:
                _clear(error)
                candidate.fail(error)
                continue
            if turn >= 0:
                for mode, seconds in zip(MODES, (forward, backward, forward + backward), strict=True):
                    candidate.seconds[mode].append(seconds)
        if turn >= 0:
            for copy in copies:
                copy.turn()
    for candidate in running:
        if candidate.status == "waiting":
            candidate.status = "timed"
    return turns


# --- one problem --------------------------------------------------------------------------------


def measure(
    problem: Problem,
    device: torch.device,
    *,
    kernels: tuple[str, ...],
    against: tuple[str, ...],
    rounds: int,
    flush: bool,
    copy_bytes: int,
    patience: float = float("inf"),
) -> dict:
    """The record of a problem: floor, copies, and a row for every candidate."""
    upstream = upstream_gradients(problem)
    competitors = candidates(problem, device, kernels, against)
    check_all(problem, competitors, upstream)
    tokens = next(iter(upstream.values())).shape[0]
    some = next(x for k, x in problem.inputs.items() if k not in problem.shared)
    vector = tokens * problem.width * some.element_size()
    # The streams, or what a case has in their place: the per-token inputs without the sublayers' outputs.
    held = sum(
        x.numel() * x.element_size()
        for k, x in problem.inputs.items()
        if k not in problem.shared and not k.startswith("layer_output")
    )
    once, far = Copy(device, held), Copy(device, copy_bytes)
    turns = take_turns(competitors, upstream, Clock(device, flush), (once, far), rounds, patience)
    floor = {
        mode: {"read": f.read, "written": f.written, "bytes": int(f.total * vector)}
        for mode, f in problem.floor.items()
    }
    return {
        "turns": turns,
        "floor": floor,
        "copy": {
            "bytes": held,
            "ms": 1e3 * statistics.median(once.seconds),
            "far_bytes": copy_bytes,
            "bytes_per_second": 2 * copy_bytes / statistics.median(far.seconds),
        },
        "rows": [*rows(competitors, floor, once, far)],
    }


def rows(competitors: list[Candidate], floor: dict, once: Copy, far: Copy) -> Iterator[dict]:
    timed = [c for c in competitors if c.status == "timed"]
    for candidate in competitors:
        row: dict[str, Any] = {
            "candidate": candidate.name,
            "kind": candidate.kind,
            "version": candidate.version,
            "status": candidate.status,
            "reason": candidate.reason,
        }
        if candidate.errors:
            name, (error, allowed) = max(
                candidate.errors.items(), key=lambda item: item[1][0] / max(item[1][1], 1e-300)
            )
            row["error"] = {"tensor": name, "value": error, "allowed": allowed}
        if candidate.status == "timed":
            row["modes"] = {
                mode: _figures(candidate, mode, floor[mode]["bytes"], once, far, timed) for mode in MODES
            }
        yield row


def _figures(candidate: Candidate, mode: str, size: int, once: Copy, far: Copy, timed) -> dict:
    own = candidate.seconds[mode]

    def over(others: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(own, others, strict=True))

    return {
        "ms": 1e3 * statistics.median(own),
        "quartiles_ms": quartiles(own),
        # A copy of so many bytes reads and writes as many.
        "share_of_copy_bandwidth": size / (2 * far.size) / over(far.seconds),
        "copies": over(once.seconds),
        "over": {other.name: over(other.seconds[mode]) for other in timed if other is not candidate},
    }


def quartiles(seconds: list[float]) -> list[float]:
    """First and third, in milliseconds."""
    if len(seconds) < 2:
        return [1e3 * seconds[0]] * 2
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return [1e3 * first, 1e3 * third]
