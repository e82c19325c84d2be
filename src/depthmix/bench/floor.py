"""What must be read from memory and written to it, at least, in D elements per token.

A token's n x D tile stays on chip: whatever is computed of it is read once. Parameters are read by all tokens and
do not count, nor do a few numbers per stream (gates, reciprocal norms). D stands for the case's own width.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """Vectors of D elements per token."""

    read: float
    written: float

    @property
    def total(self) -> float:
        return self.read + self.written

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.read + other.read, self.written + other.written)


Floors = dict[str, Floor]
"""Of ``forward``, ``backward`` and ``both``."""


def floors(forward: Floor, backward: Floor) -> Floors:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def step(n: int) -> Floors:
    """A step on n streams. Forward: streams and y in, streams and h out. Backward: streams, y and the gradients of
    streams and h in, those of streams and y out."""
    return floors(Floor(n + 1, n + 1), Floor(2 * n + 2, n + 1))


def window(n: int, steps: int) -> Floors:
    """A replay window of MGR steps, anchor in, streams out behind the last.

    Forward, a step may leave the streams unwritten and the next read the anchor and the outputs since instead:
    the cheapest such plan. Backward, each step reads the anchor and the window's earlier outputs where an ordinary one
    reads its streams.
    """
    # best[j]: cheapest way to have written the streams behind step j, anchor behind step 0.
    best = [Floor(0, 0)]
    for j in range(1, steps + 1):
        plans = []
        for i in range(j):  # streams written behind step i, and not again before step j
            read = sum(n + k + 1 for k in range(j - i))
            plans.append(best[i] + Floor(read, (j - i) + n))
        best.append(min(plans, key=lambda plan: plan.total))
    backward = Floor(0, 0)
    for k in range(steps):
        backward += Floor(2 * n + 2 + k, n + 1)
    return floors(best[-1], backward)


def pool(k: int) -> Floors:
    """k sources in, their mean out; backward k sources and one gradient in, k out."""
    return floors(Floor(k, 1), Floor(k + 1, k))


def block(sources: int, reads: int) -> Floors:
    """The reads behind each sublayer of a block of Attention Residuals: finished sources and the running sum.

    In two phases the finished sources are read once for all reads, and a partial mean written for each; a read then
    takes its partial mean, y and the running sum, and writes h and the new running sum (the first output is its own
    running sum). Backward a read takes the gradients of h and of the running sum, the running sum and the partial
    mean, and writes the gradient of y; the finished sources then meet all gradients of h at once. Reading the
    sources every time instead is cheaper where there are few of them: the floor is that of the cheaper way.
    """
    sums = Floor(2 * reads - 1, 2 * reads - 1)
    forward = [Floor(sources + reads, reads) + sums, Floor(sources * reads, 0) + sums]
    backward = [
        Floor(sources + 5 * reads, sources + reads),
        # Sources and their gradients so far come and go with every read.
        Floor((sources + 3) * reads + sources * (reads - 1), (sources + 1) * reads),
    ]
    return floors(*(min(plans, key=lambda plan: plan.total) for plans in (forward, backward)))


def channel_gate() -> Floors:
    """x and u in, x' out; backward x, u and a gradient in, two out. The matrix product's own work comes on top."""
    return floors(Floor(2, 1), Floor(3, 2))


def sinkhorn() -> Floors:
    """Logits in, matrix out; backward logits and a gradient in, one out. D is n * n here."""
    return floors(Floor(1, 1), Floor(2, 1))


def hyper(n: int, sublayers: int) -> Floors:
    """Hyper-Connections around a number of sublayers: a read, steps, a write.

    A step moves what a step of MGR does; the read in front takes the streams and gives h, the write at the end takes
    streams and y and gives the streams. Backward likewise, gradients included.
    """
    inner = step(n)
    first = floors(Floor(n, 1), Floor(2 * n + 1, n))
    last = floors(Floor(n + 1, n), Floor(2 * n + 1, n + 1))
    forward, backward = (first[mode] + last[mode] for mode in ("forward", "backward"))
    for _ in range(sublayers - 1):
        forward, backward = forward + inner["forward"], backward + inner["backward"]
    return floors(forward, backward)
