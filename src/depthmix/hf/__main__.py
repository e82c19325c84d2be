"""``python -m depthmix.hf ...``: the command ``transformers`` with depthmix models known to it.

``python -m depthmix.hf serve exported`` serves an exported model.
"""

import sys

from transformers.cli.transformers import app

import depthmix.hf  # noqa: F401

if __name__ == "__main__":
    sys.argv[0] = "transformers"
    app()
