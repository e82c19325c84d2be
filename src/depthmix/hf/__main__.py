"""``python -m depthmix.hf ...``: the command ``transformers`` with depthmix models known to it.

``python -m depthmix.hf serve exported`` serves an exported model (:mod:`depthmix.hf.serving`).
"""

import contextlib
import sys

from transformers.cli.transformers import app

import depthmix.hf  # noqa: F401

if __name__ == "__main__":
    if "serve" in sys.argv[1:2]:
        with contextlib.suppress(ImportError):  # transformers says itself what it lacks
            from depthmix.hf.serving import install

            install()
    sys.argv[0] = "transformers"
    app()
