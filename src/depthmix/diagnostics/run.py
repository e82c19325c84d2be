"""All diagnostics of one model on given texts."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import RunError, UserError
from . import PARTS, passes
from .arrays import Diagnosis
from .measures import measure
from .subject import Subject


@dataclass(frozen=True)
class Extent:
    """How much is computed."""

    batch: int = 8
    """Texts at a time."""
    removal_texts: int = 128
    """Texts, from the first, that block removal takes; 0 takes all."""
    gradient_texts: int = 64
    """Texts, from the first, that the gradient is the mean over; 0 takes all."""
    mixing_tokens: int = 2048
    """Tokens of the mixing map and of the reconstruction error."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Which of ``PARTS``."""

    def __post_init__(self):
        for name in ("batch", "mixing_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("removal_texts", "gradient_texts"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0 (0: all), got {getattr(self, name)}")


def diagnose(
    subject: Subject,
    texts: Tensor,
    extent: Extent | None = None,
    *,
    source: str = "",
    progress: Callable[[str, float], None] = lambda part, share: None,
) -> Diagnosis:
    """What ``subject`` does with ``texts``.

    Args:
        subject: the model.
        texts: ``[N, T]`` token ids, T >= 2, no more than the model's sequence length.
        extent: how much; ``None`` is :class:`Extent` as it stands.
        source: one line that says what text this is; kept with the result.
        progress: called with a part's name and the share of it that is done, 0 to 1.

    Returns:
        A :class:`~depthmix.diagnostics.arrays.Diagnosis`. A part that cannot be had of this model is in its
        ``missing``, with the reason; activations that are not finite are in its ``warnings``, by sublayer.

    Raises:
        ValueError: ``texts`` does not fit.
    """
    extent = extent or Extent()
    _check(subject, texts)
    found = Diagnosis(subject.describe(), {"texts": len(texts), "length": texts.shape[1], "source": source})
    removal = texts[: extent.removal_texts or len(texts)]
    gradient = texts[: extent.gradient_texts or len(texts)]
    found.text |= {"removal_texts": len(removal), "gradient_texts": len(gradient)}
    work = {
        "activations": lambda p: measure(subject, texts, extent.batch, p),
        "gradients": lambda p: passes.gradient_rms(subject, gradient, extent.batch, p),
        "removal": lambda p: passes.block_removal(subject, removal, extent.batch, p),
        "mixing": lambda p: passes.mixing(subject, texts, extent.mixing_tokens),
        "reconstruction": lambda p: passes.reconstruction(subject, texts, extent.mixing_tokens),
    }
    counts = {"activations": len(texts), "gradients": len(gradient), "removal": len(removal)}
    for part, run in work.items():
        if part not in extent.parts:
            found.missing[part] = "not asked for"
            continue
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found.arrays |= run(_shares(part, counts.get(part, 1), progress))
            except (UserError, RunError) as error:
                found.missing[part] = str(error)
        found.warnings += [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        found.seconds[part] = round(time.perf_counter() - start, 3)
        progress(part, 1.0)
    if "removal_delta" in found:
        without = np.flatnonzero(np.isnan(found["removal_delta"])).tolist()
        reasons = {str(block): subject.kept_because(block) for block in without}
        found.subject["kept_because"] = {block: why for block, why in reasons.items() if why}
    _name_what_is_missing(found, extent)
    _name_what_is_not_finite(found)
    if "top_hidden_token" in found:
        tokens = np.unique([found["top_hidden_token"], found["top_output_token"]])
        words = {str(t): subject.decode([int(t)]) for t in tokens if t >= 0}
        found.text["top_tokens"] = {token: word for token, word in words.items() if word is not None}
    return found


def _shares(part: str, texts: int, progress) -> Callable[[float], None]:
    """What a part calls with the number of texts it has done since its last call."""
    done = 0.0

    def advance(more: float) -> None:
        nonlocal done
        done += more
        progress(part, min(done / texts, 1.0))

    return advance


def _check(subject: Subject, texts: Tensor) -> None:
    if texts.dim() != 2 or texts.dtype.is_floating_point or not len(texts):
        raise UserError(f"texts must be whole numbers of shape [N, T], got {texts.dtype} {list(texts.shape)}")
    if not 2 <= texts.shape[1] <= subject.max_length:
        raise UserError(
            f"texts of {texts.shape[1]} tokens do not fit: diagnostics need at least 2, and {subject.name} takes "
            f"{subject.max_length} at most"
        )


def _name_what_is_missing(found: Diagnosis, extent: Extent) -> None:
    """Figures that the pass over all texts did not give, by what the connection does not have."""
    if "activations" not in extent.parts:
        return
    residual = found.subject["residual"]
    for figure, array, reason in (
        ("streams", "stream_max", "has no parallel streams"),
        ("gates", "gate_mean", "has no gates"),
        ("pools", "pool_mean", "does not read by weights"),
        ("amplification", "amplification_max", "has no convex gates of streams"),
    ):
        if array not in found:
            found.missing[figure] = f"{residual} {reason}"


def _name_what_is_not_finite(found: Diagnosis) -> None:
    if "not_finite" not in found:
        return
    counts: np.ndarray = found["not_finite"]
    places = [
        f"{('attention', 'MLP')[s % 2]} {s // 2} ({int(counts[s]):,} tokens)" for s in np.flatnonzero(counts)
    ]
    if places:
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        found.warnings.append(
            f"activations that are NaN or infinite behind {', '.join(places[:4])}{more}; figures of these layers "
            f"leave them out or stay empty"
        )
