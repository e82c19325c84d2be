"""Commands of Python as processes of their own that need not import torch again: ``run(["-m", "depthmix", ...])``.

A server imports torch and what else takes long, and nothing of depthmix; for each command it forks. The process begins
as ``python`` would have begun it: arguments, working directory, environment, ``PYTHONPATH``, ``__main__``, output in
files of its own. ``torchrun`` starts several, which find each other as those of ``torchrun`` do. What is to be said of
a fresh interpreter (which modules are loaded, what a variable does that torch reads when it is imported), or of
torchrun itself, is for ``subprocess``.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

LATE = (
    "torch",
    "torch._dynamo",
    "matplotlib.figure",
    "safetensors.torch",
    "tokenizers",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "rich.progress",
    "tyro",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
)
"""What commands import sooner or later, and no variable of the environment changes but ``MPLBACKEND``."""


def run(
    arguments: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` to its end, with what it said: arguments as ``-m MODULE ...``, ``-c CODE ...`` or a file.

    Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds; whoever the command has started ends with it.
    """
    (done,) = _run(arguments, cwd, [os.environ if env is None else env], timeout)
    return done


def torchrun(
    arguments: Sequence[object],
    processes: int,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[subprocess.CompletedProcess[str]]:
    """``python ARGUMENTS`` by as many processes, by rank. When one fails, the others are sent SIGTERM."""
    import torch.distributed as dist

    # Port 0: the system chooses a free one, which nobody can take in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run(
        arguments, cwd, [{**(os.environ if env is None else env), **shared, **o} for o in own], timeout
    )


def _run(
    arguments: Sequence[object], cwd: Path | None, environments: Sequence[Mapping[str, str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = [
            [str(Path(folder, f"{name}-{number}")) for name in ("stdout", "stderr")]
            for number in range(len(environments))
        ]
        request = {
            "arguments": words,
            "cwd": str(cwd or os.getcwd()),
            "environments": [dict(environment) for environment in environments],
            "timeout": timeout,
            "said": said,
        }
        statuses = _server().ask(request)
        texts = [[Path(path).read_text(encoding="utf-8") for path in own] for own in said]
    if None in statuses:
        raise subprocess.TimeoutExpired(words, timeout, *("".join(text) for text in zip(*texts, strict=True)))
    return [
        subprocess.CompletedProcess(words, status, *text)
        for status, text in zip(statuses, texts, strict=True)
    ]


def cache(folder: Path) -> str:
    """``folder`` as an empty ``DEPTHMIX_CACHE``, but for the CPU kernels: they are compiled anew in test_native.py."""
    kept = Path(os.environ.get("DEPTHMIX_CACHE") or "~/.cache/depthmix").expanduser() / "native"
    kept.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "native").symlink_to(kept)
    return str(folder)


class _Server:
    def __init__(self):
        (theirs, self._to), (self._from, ours) = os.pipe(), os.pipe()
        environment = os.environ | {"MPLBACKEND": "agg"}
        command = [sys.executable, __file__, str(theirs), str(ours)]
        self.process = subprocess.Popen(command, pass_fds=(theirs, ours), env=environment)
        os.close(theirs)
        os.close(ours)
        self._requests, self._replies = os.fdopen(self._to, "w"), os.fdopen(self._from)

    def ask(self, request: dict) -> list[int | None]:
        """Exit status of each process; minus the number of the signal that ended it; ``None`` for a timeout."""
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._replies.readline())

    def close(self) -> None:
        self._requests.close()
        self.process.wait()


@functools.cache
def _server() -> _Server:
    """One for each process of pytest; it ends when that closes its pipe, however it ends."""
    server = _Server()
    atexit.register(server.close)
    return server


def _serve(requests: int, replies: int) -> int:
    """Exit status of the process that returns from here: the server, or one that it has forked."""
    for name in LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with os.fdopen(requests) as asked, os.fdopen(replies, "w") as answers:
        for line in asked:
            request = json.loads(line)
            pids = []
            for environment, said in zip(request["environments"], request["said"], strict=True):
                pid = os.fork()
                if pid == 0:
                    return _command(request["arguments"], request["cwd"], environment, said)
                pids.append(pid)
            answers.write(json.dumps(_ended(pids, request["timeout"])) + "\n")
            answers.flush()
    return 0


def _ended(pids: list[int], timeout_s: float) -> list[int | None]:
    found: dict[int, int | None] = {}
    until, told = time.monotonic() + timeout_s, False
    while len(found) < len(pids):
        left = [pid for pid in pids if pid not in found]
        for pid in left:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[pid] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > until
        if late or (not told and any(found.values())):
            told = True
            for pid in left:
                if pid not in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL if late else signal.SIGTERM)
                    if late:
                        os.waitpid(pid, 0)
                        found[pid] = None
        time.sleep(0.01)
    return [found[pid] for pid in pids]


def _command(arguments: list[str], cwd: str, environment: dict[str, str], said: list[str]) -> int:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in said]
    for number, file in enumerate([null, *files]):
        os.dup2(file, number)
    what, *rest = arguments
    first = {"-c": "", "-m": os.getcwd()}.get(what, str(Path(what).parent))
    path = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [first, *path]
    try:
        if what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif what == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        else:
            sys.argv = arguments
            runpy.run_path(what, run_name="__main__")
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_serve(int(sys.argv[1]), int(sys.argv[2])))
