"""Named arrays with named axes and units, and the file they are kept in."""

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers that say what they are."""

    values: np.ndarray
    axes: tuple[str, ...]
    """A name for every dimension; :mod:`depthmix.diagnostics` says what each counts."""
    unit: str
    """``"nats"``, ``"share"``, ``"count"``, ...; ``""`` where there is none."""
    about: str
    """One line: what the numbers are."""

    def __post_init__(self):
        if np.ndim(self.values) != len(self.axes):
            raise ValueError(f"an array of shape {np.shape(self.values)} has axes {self.axes}")


@dataclass(eq=False)
class Diagnosis:
    """What was found of one model."""

    subject: dict
    """Of the model: ``name``, ``label``, ``residual``, ``detail``, ``n_layer``, ``d_model``, ``n_streams``,
    ``parameters``; of its blocks ``kept_because``: number -> why it cannot be removed."""
    text: dict
    """Of the text: ``texts``, ``length`` (tokens of each), ``source``; ``removal_texts``, ``gradient_texts``;
    ``top_tokens``: id -> text, of the tokens at the largest activations."""
    arrays: dict[str, Array] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Figures that could not be made, and why: by the name of the figure."""
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time of every part; not part of what repeats."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name].values

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def save(self, path: str | Path) -> Path:
        """Write an ``.npz`` file, whole or not at all; :meth:`load` reads it, and so does ``numpy.load``.

        Every array is there by its name. ``about`` is JSON text: ``{"format", "subject", "text", "missing", "warnings",
        "seconds", "arrays": {name: {"axes", "unit", "about"}}}``.
        """
        from ..report.write import write_atomically

        described = {
            name: {"axes": list(a.axes), "unit": a.unit, "about": a.about} for name, a in self.arrays.items()
        }
        about = {
            "format": FORMAT,
            "subject": self.subject,
            "text": self.text,
            "missing": self.missing,
            "warnings": self.warnings,
            "seconds": self.seconds,
            "arrays": described,
        }
        buffer = io.BytesIO()
        # Arrays; by their type alone, one of the names could be that of an option of numpy's.
        values: dict[str, Any] = {name: a.values for name, a in self.arrays.items()}
        np.savez_compressed(buffer, about=np.array(json.dumps(about)), **values)
        return write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Diagnosis":
        """Read what :meth:`save` wrote. Raises ``ValueError`` when ``path`` is no such file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            about = json.loads(str(values.pop("about")))
            if about["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {about['format']}, this version reads {FORMAT}; make it anew with "
                    f"`depthmix diagnose`"
                )
            arrays = {
                name: Array(values[name], tuple(d["axes"]), d["unit"], d["about"])
                for name, d in about["arrays"].items()
            }
            parts = (about[k] for k in ("missing", "warnings", "seconds"))
            return cls(about["subject"], about["text"], arrays, *parts)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no file that `depthmix diagnose` wrote ({error})") from error
