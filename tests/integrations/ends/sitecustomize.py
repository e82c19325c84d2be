"""On the path of a process of several, tells how it ends: a file in ``ENDS`` with the names of gloo's threads left."""

import atexit
import os
from pathlib import Path


def tell() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in names if "gloo" in name]
    Path(os.environ["ENDS"], os.environ["RANK"]).write_text("\n".join(left))


if "RANK" in os.environ and "ENDS" in os.environ:
    atexit.register(tell)  # first of all, so that it is called last
