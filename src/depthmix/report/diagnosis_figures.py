"""The figures of a diagnosis: what each needs, how it is read, and its drawings.

:data:`FIGURES` lists them in the order of the page. Each becomes a PNG for print and, as
:mod:`~depthmix.report.plots` does, an SVG for the page. All runs are in one figure, on the same scales. Blocks,
sublayers, streams and depths count from 0, as the arrays do; values that are not finite are not drawn, and sublayers
that had any are shaded.
"""

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import diagnosis_drawings as drawings
from . import mixing
from .diagnosis_canvas import Shown, drawing, without_comments
from .plots import _SVG_INK, INK, inline_svg

DPI = 300


@dataclass(frozen=True)
class DiagnosisFigure:
    """A figure of all runs that have what it needs."""

    key: str
    """Name of the file, without ``.png``."""
    group: str
    """Its name in ``Diagnosis.missing``."""
    title: str
    paper: str
    """Its number in the paper; empty where the paper has none."""
    shown: str
    look: str
    needs: tuple[str, ...]
    draw: Callable | None = None

    def has(self, run: Shown) -> bool:
        """Whether ``run`` can be drawn."""
        return run.has(*self.needs)

    def reason(self, run: Shown) -> str:
        """Why ``run`` is not in it."""
        missing = run.diagnosis.missing
        if self.key == "removal" and "removal_delta" in run.diagnosis:
            return "no block can be removed: " + "; ".join(drawings.kept_because(run))
        # What has no part of its own comes from the pass over all texts.
        own = missing.get(self.key) or missing.get(self.group)
        return own or missing.get("activations") or "nothing finite was measured"

    def render(self, runs: list[Shown]) -> tuple[bytes, str, float]:
        """A PNG on white for print, an SVG element in the page's ink, and the width in inches of both."""
        assert self.draw is not None, "a figure that renders itself has no other drawing"
        buffer = io.BytesIO()
        with drawing(_SVG_INK):
            figure = self.draw(runs, _SVG_INK)
            figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            # Where everything stands is found: most of the time of drawing goes there.
            figure.set_layout_engine("none")
            figure.patch.set_alpha(0)
            for ax in figure.axes:
                ax.patch.set_alpha(0)
            svg = without_comments(inline_svg(figure, self.title))
        return buffer.getvalue(), svg, figure.get_figwidth()


class MixingFigure(DiagnosisFigure):
    """Mixing maps, as :mod:`~depthmix.report.mixing` draws them."""

    def has(self, run):
        return super().has(run) and bool(np.isfinite(run["mixing_matrix"]).all())

    def render(self, runs):
        panels = _maps(runs)
        with drawing(INK):
            png = mixing._drawn(panels, INK, "png", dpi=DPI, metadata={"Software": None})
            svg = without_comments(mixing.svg(panels, self.title))
        return png, svg, 3.3 * (2 if len(runs) == 1 else min(len(runs), mixing.COLUMNS)) + 0.9


def _maps(runs: list[Shown]) -> list[mixing.Panel]:
    return [
        mixing.Panel(
            "\n".join(textwrap.wrap(run.label, 40)),
            run.diagnosis.subject.get("detail") or "",
            run["mixing_matrix"],
        )
        for run in runs
    ]


FIGURES = (
    DiagnosisFigure(
        "outputs", "outputs", "Size of outputs", "Fig. 2, left",
        "Root mean square, over all tokens and channels, of what stands behind each block and of what its two "
        "sublayers return.",
        "A line that climbs with depth: later sublayers must shout to be heard in the sum (PreNorm dilution). Flat is "
        "healthy.",
        ("output_rms",), drawings.outputs,
    ),
    DiagnosisFigure(
        "gradients", "gradients", "Gradient by block", "Fig. 2, right",
        "Root mean square of the loss's derivative over the parameters of each block.",
        "A fall from the first blocks to the last: deep blocks learn little. Alike in all blocks is what one wants.",
        ("gradient_rms",), drawings.gradients,
    ),
    DiagnosisFigure(
        "distance", "distance", "Angular distance between depths", "Fig. 3, 8 and 9",
        "arccos(cosine) / π between what enters block ℓ and what is there n blocks later, last token, mean over texts; "
        "of the hidden state and of each stream.",
        "Dark lower right corners: deep blocks that change nothing. Dark streams are static. The ring is the block "
        "whose input and output differ least; 0.5 is a right angle.",
        ("angular_distance",), drawings.distance,
    ),
    DiagnosisFigure(
        "removal", "removal", "Removing one block", "Fig. 4",
        "Change of the mean loss (log perplexity) when one block writes nothing, without fine-tuning, with standard "
        "errors over texts.",
        "Blocks near zero are redundant, a block far above the others cannot be spared. Even heights: all depths are "
        "in use.",
        ("removal_delta",), drawings.removal,
    ),
    DiagnosisFigure(
        "activations-attention", "activations", "Largest activations, attention", "Fig. 10 and 11a",
        "The three largest absolute values over all texts, behind each attention: of the state that is read next "
        "(above), of attention's output (below).",
        "A plateau far above the median that begins in an early block and stays. Rings are massive activations: above "
        "100 and above 1000 times the median.",
        ("top_hidden", "median_hidden"), drawings.activations(0),
    ),
    DiagnosisFigure(
        "activations-mlp", "activations", "Largest activations, MLP", "Fig. 5 and 11b",
        "The three largest absolute values over all texts, behind each MLP: of the state that is read next (above), of "
        "the MLP's output (below).",
        "The MLP that first writes a massive value, and the depth from which it stays. Rings: above 100 and above 1000 "
        "times the median.",
        ("top_hidden", "median_hidden"), drawings.activations(1),
    ),
    DiagnosisFigure(
        "streams", "streams", "Size of streams", "Fig. 6 and 12",
        "Largest absolute value of each stream behind attention and behind the MLP, and root mean square behind the "
        "block; dotted: the hidden state read from them.",
        "Streams that stay within a few times of each other, without growth over depth. One far above all others "
        "carries the massive activations.",
        ("stream_max",), drawings.streams,
    ),
    DiagnosisFigure(
        "gates", "gates", "Gates", "Fig. 7 and 13",
        "Above all gate values of each sublayer (stronger: more of them) and their mean; then boxes from 25 to 75 %, "
        "whiskers from 5 to 95 %, circles at the largest, both by the square root; below the mean of each stream.",
        "Most gates below 0.1 and few circles near 1: then streams can be reconstructed by inversion. A stream whose "
        "gate stays near zero is not written.",
        ("gate_mean", "gate_max"), drawings.gates,
    ),
    DiagnosisFigure(
        "pools", "pools", "Pool weights", "",
        "Mean weight of each stream (or earlier output) in what is read behind every sublayer, and the entropy of the "
        "weights: 0 one source, 1 all alike.",
        "Bright cells: the source that a sublayer listens to. Entropy near 1 everywhere: the pool averages and selects "
        "nothing.",
        ("pool_mean",), drawings.pools,
    ),
    DiagnosisFigure(
        "amplification", "amplification", "Gate amplification", "",
        "By how many powers of ten inversion may have enlarged an error of each stream since the first lerp: the "
        "largest of any token (strong) and the mean (faint).",
        "Lines that reach the digits of a number format: from there on, nothing of the stream can be reconstructed in "
        "it without keeping rows.",
        ("amplification_max",), drawings.amplification,
    ),
    DiagnosisFigure(
        "reconstruction", "reconstruction", "Reconstruction of streams", "",
        "Largest relative error of streams that inversion reconstructs, the bound that was foreseen for it, and the "
        "share of rows that are kept instead.",
        "Measured stays below the bound and far below one. Anchors (dotted), where all rows are kept, set the error "
        "back.",
        ("reconstruction_measured",), drawings.reconstruction,
    ),
    DiagnosisFigure(
        "rank", "rank", "Effective rank, and likeness of streams", "",
        "Number of directions in use over sampled tokens (exp of the entropy of singular values) by depth; cosine "
        "between streams: all pairs by depth, each pair at the end.",
        "A fall of rank: tokens collapse into few directions. Cosines near one: streams that say the same.",
        ("effective_rank",), drawings.rank,
    ),
    MixingFigure(
        "mixing", "mixing", "Mixing map", "",
        "How much of every source (column) is in what every sublayer reads (row); above on one colour scale, below "
        "relative to the largest of the row. A1 is the attention of the first block.",
        "Strong columns: outputs that all later depths still hear, the embedding first. A strong diagonal alone: only "
        "the newest output is read.",
        ("mixing_matrix",),
    ),
)  # fmt: skip
