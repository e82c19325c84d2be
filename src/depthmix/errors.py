"""What can go wrong, by who has to act.

The command line turns each into one message and an exit status; a traceback
means a defect in depthmix itself.
"""

from collections.abc import Iterable

EXIT_FAILED = 1
"""The run failed: loss not finite, disk full, checkpoint damaged."""
EXIT_USAGE = 2
"""The request was wrong: an option, a path, a configuration."""
EXIT_INTERRUPTED = 75
"""Stopped by SIGINT or SIGTERM after saving; the same command with ``--resume`` goes on."""


class UserError(ValueError):
    """The request cannot be met as given. The message names the thing, the value and the remedy."""

    exit_status = EXIT_USAGE


class RunError(RuntimeError):
    """Something failed while running. The message names the file or step and what to do."""

    lost = False
    """Whether other processes of the run are lost: nothing that waits for them ends well."""
    exit_status = EXIT_FAILED


class Interrupted(Exception):
    """A signal ended the run; everything up to the last finished step is saved."""

    exit_status = EXIT_INTERRUPTED


def suggest(value: str, choices: Iterable[str], what: str) -> str:
    """The sentence for an unknown name: what it was, the nearest right one, all the right ones."""
    import difflib

    choices = list(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {value!r}.{hint} Valid: {', '.join(choices)}"
