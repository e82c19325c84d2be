"""Which source runs: what a record names, so that its figures can be repeated."""

import os
import subprocess
from pathlib import Path


def commit(digits: int = 8) -> str | None:
    """The commit of the source that runs, ``+`` behind it where files of it differ; ``None`` where nothing tells.

    A copy that lies outside of its repository, or in another project's, has none; ``DEPTHMIX_COMMIT`` says it then, and
    whenever it is set.
    """
    said = os.environ.get("DEPTHMIX_COMMIT")
    if said:
        return said
    here = Path(__file__).parent

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        ran.check_returncode()
        return ran.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "HEAD")[:digits] + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None
