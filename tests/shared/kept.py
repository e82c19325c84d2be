"""``pytest --kept FILE``: a run of tests that goes on where an earlier one, stopped at any moment, left off.

FILE takes the name of each test that has passed, one a line, as soon as it has, and a test named there is left out. The
first line is a digest of the sources and the tests: with others, everything runs again.
"""

import hashlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sources() -> str:
    """A digest of everything in ``src`` and ``tests`` that is not made by running it."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("src", "tests") for p in (ROOT / folder).rglob("*") if p.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def pytest_addoption(parser):
    parser.addoption(
        "--kept",
        metavar="FILE",
        type=Path,
        help="leave out the tests that FILE names, and add to it each one that passes",
    )


class Kept:
    """Reads FILE once, in the first process alone: with xdist all processes must collect the same tests."""

    def __init__(self, config):
        self.worker = getattr(config, "workerinput", None)
        self.path = config.getoption("kept")
        self.passed = set(self.worker["kept"]) if self.worker is not None else self.read()
        self.ran: set[str] = set()

    def read(self) -> set[str]:
        first = sources()
        known, *names = self.path.read_text().splitlines() if self.path.exists() else [""]
        if known == first:
            return set(names)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(first + "\n")
        return set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["kept"] = sorted(self.passed)

    def pytest_collection_modifyitems(self, config, items):
        gone = [item for item in items if item.nodeid in self.passed]
        if gone:
            items[:] = [item for item in items if item.nodeid not in self.passed]
            config.hook.pytest_deselected(items=gone)

    def pytest_runtest_logreport(self, report):
        if self.worker is not None or not report.passed:
            return
        if report.when == "call":
            self.ran.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid in self.ran:
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        # Nothing left to run is no error.
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config):
    if config.getoption("kept") is not None:
        config.pluginmanager.register(Kept(config))
