"""The commit that records name: of a copy of ``source.py`` in repositories made here."""

import importlib.util
import shutil
import subprocess

import pytest

from depthmix import source


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """``source.py`` in a folder that is a repository of its own, in which nothing is committed; and git there."""
    monkeypatch.delenv("DEPTHMIX_COMMIT", raising=False)
    folder = tmp_path / "src"
    folder.mkdir()
    copy = shutil.copy(source.__file__, folder / "source.py")

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    spec = importlib.util.spec_from_file_location("source_elsewhere", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, git, folder


def test_a_commit_and_what_differs_from_it(elsewhere):
    module, git, folder = elsewhere
    (folder / "notes.txt").write_text("of another project")
    git("add", "notes.txt")
    git("commit", "-qm", "first")
    assert module.commit() is None  # a repository, but not of this source
    git("add", "source.py")
    git("commit", "-qm", "second")
    assert module.commit() == git("rev-parse", "HEAD")[:8]
    assert module.commit(40) == git("rev-parse", "HEAD")
    (folder / "more.py").write_text("")
    assert module.commit(7) == git("rev-parse", "HEAD")[:7] + "+"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # no git
        assert module.commit() is None
        patch.setenv("DEPTHMIX_COMMIT", "cafe123")
        assert module.commit() == "cafe123"
