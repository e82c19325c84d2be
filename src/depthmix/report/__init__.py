"""Figures and pages of finished, running or broken-off runs, made from their saved files only.

Nothing here imports the model or the trainer: a run folder copied from another
machine gives the same report.

- :func:`write_run_report`: ``loss.png`` and ``report.html`` of one run.
- :func:`write_compare_report`: ``results.json``, ``loss.png`` and ``report.html`` of a comparison.
"""

from .write import write_compare_report, write_run_report

__all__ = ["write_compare_report", "write_run_report"]
