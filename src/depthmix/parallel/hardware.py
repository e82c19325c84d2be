"""Machines as a cost model sees them: a few rates, each either measured here or assumed and called so.

The presets take peaks from the makers' data sheets and multiply them by an efficiency; **the efficiencies are
assumptions**, nothing of these presets was measured. :func:`measured_from` makes a machine of constants that
``benchmarks/plan_validation.py`` measured.
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass, field

from ..errors import UserError, suggest


@dataclass(frozen=True)
class Hardware:
    """Rates of one device and of the links between devices."""

    name: str
    matmul: tuple[tuple[int, float], ...]
    """``(width, FLOP/s)``: what products of ``[tokens, width] x [width, ...]`` reach, not the peak; linear in
    log(width)     between entries, constant outside."""
    attention_flops: float
    """FLOP/s of causal attention, of the operations that the mask leaves."""
    bandwidth: float
    """Bytes a second, read plus written, of element-wise passes."""
    connection_share: dict[str, float]
    """Share of ``bandwidth`` at which a connection's own passes run, by name; ``""`` for all others."""
    intra_bandwidth: float
    """Bytes a second that one device sends inside of a node."""
    inter_bandwidth: float
    """Bytes a second that one device sends to other nodes."""
    intra_latency: float
    """Seconds of a message inside of a node."""
    inter_latency: float
    memory: float
    """Bytes of one device."""
    devices_per_node: int
    block_overhead: float = 0.0
    """Seconds that a block and micro-batch, forward and backward, take whatever their size."""
    connection_overhead: dict[str, float] = field(default_factory=dict)
    """Seconds a sublayer and micro-batch that a connection adds to that, by name."""
    step_overhead: float = 0.0
    """Seconds an optimiser step takes whatever the size."""
    overlap: dict[str, float] = field(default_factory=lambda: {"dp": 0.8, "fsdp": 0.8})
    """Share of the computation at hand that hides the communication of an axis; 0 where not named."""
    usable: float = 0.9
    """Share of the memory that may be filled: the rest is for the allocator and the communication library."""
    source: str = ""
    """Where the numbers are from, and which are assumptions."""

    def matmul_flops(self, width: float) -> float:
        """FLOP/s of a matrix product whose smaller side is ``width``."""
        table = self.matmul
        if width <= table[0][0]:
            return table[0][1]
        if width >= table[-1][0]:
            return table[-1][1]
        i = bisect.bisect([w for w, _ in table], width)
        (w0, r0), (w1, r1) = table[i - 1], table[i]
        return r0 + (r1 - r0) * math.log(width / w0) / math.log(w1 / w0)

    def share(self, residual: str) -> float:
        return self.connection_share.get(residual, self.connection_share[""])

    def link(self, stride: int, group: int) -> tuple[float, float]:
        """``(bytes a second, seconds of latency)`` for each of ``group`` devices that are ``stride`` apart.

        A group inside of a node uses the node's links. One that spans nodes has k members in each and sends over its k
        network ports at once, as a hierarchical ring does, but never faster than inside.
        """
        if stride * group <= self.devices_per_node:
            return self.intra_bandwidth, self.intra_latency
        members = max(1, min(group, self.devices_per_node // stride))
        return min(self.intra_bandwidth, members * self.inter_bandwidth), self.inter_latency

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def measured_from(values: dict) -> Hardware:
    """The hardware that :meth:`Hardware.to_dict` describes."""
    return Hardware(**{**values, "matmul": tuple((int(w), float(r)) for w, r in values["matmul"])})


def _node(name, peak, hbm, memory_gb, intra, inter, source) -> Hardware:
    # Assumptions, the same for all: half of the peak for products, .35 of it for attention, .8 of the memory's and of
    # the links' bandwidth; connections at .7 of the bandwidth of element-wise passes.
    return Hardware(
        name=name,
        matmul=((1024, 0.35 * peak), (4096, 0.5 * peak)),
        attention_flops=0.35 * peak,
        bandwidth=0.8 * hbm,
        connection_share={"": 0.7},
        intra_bandwidth=0.8 * intra,
        inter_bandwidth=0.8 * inter,
        intra_latency=5e-6,
        inter_latency=15e-6,
        memory=memory_gb * 1e9,
        devices_per_node=8,
        source=source
        + "; assumed, not measured: .5 of the peak for matrix products of width 4096 and more, falling to .35 at 1024, "
        ".35 for attention, .8 of memory and link bandwidth, connections at .7 of that of memory, latencies, overlap",
    )


HARDWARE = {
    "h100": _node(
        "h100", 989e12, 3.35e12, 80, 450e9, 50e9,
        "NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16 dense, 3.35 TB/s, 80 GB, NVLink 900 GB/s both ways; one 400 Gb/s "
        "port a GPU",
    ),
    "h200": _node(
        "h200", 989e12, 4.8e12, 141, 450e9, 50e9,
        "NVIDIA H200 SXM data sheet: 989 TFLOP/s bf16 dense, 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways; one 400 Gb/s "
        "port a GPU",
    ),
    "a100": _node(
        "a100", 312e12, 2.039e12, 80, 300e9, 25e9,
        "NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16 dense, 2.039 TB/s, 80 GB, NVLink 600 GB/s both ways; one "
        "200 Gb/s port a GPU",
    ),
}  # fmt: skip


def hardware_of(name: str) -> Hardware:
    """The preset of that name."""
    if name.lower() not in HARDWARE:
        raise UserError(suggest(name, HARDWARE, "hardware"))
    return HARDWARE[name.lower()]
