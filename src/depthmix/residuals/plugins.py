"""Connections from elsewhere: importing a module that calls ``register`` is all it takes.

Installed packages name theirs by the entry point ``depthmix.residuals``; ``$DEPTHMIX_PLUGINS`` names further modules,
with commas between. Processes that depthmix starts inherit both.
"""

import importlib
import os
from importlib.metadata import entry_points

from ..errors import UserError

GROUP = "depthmix.residuals"
VARIABLE = "DEPTHMIX_PLUGINS"


def load() -> None:
    """Import every one. Raises ``UserError`` with the module and the reason where one cannot be imported."""
    wanted = [
        (entry.value.partition(":")[0], f"the entry point {entry.name!r}")
        for entry in entry_points(group=GROUP)
    ]
    names = os.environ.get(VARIABLE, "").split(",")
    wanted += [(name.strip(), f"${VARIABLE}") for name in names if name.strip()]
    for module, source in wanted:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise UserError(
                f"{source} names the module {module!r} of residual connections, and importing it failed: "
                f"{type(error).__name__}: {error}; mend or install it, or take the name away"
            ) from error
