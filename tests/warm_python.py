"""Real Python processes that start at once: a server imports the public libraries, and forks for each process.

    python = WarmPython()                                    # imports torch, transformers, ... once
    code, printed = python.run("-m", "hf_specauf.hub", ...)  # what `python -m hf_specauf.hub ...` would do

Importing torch, transformers, trl and peft takes longer than most of what the tests then do in a process. A forked
process has these libraries, and nothing that another process did: no weights, no remote code, no environment variable.
The server never imports this package, so a process may also be a stranger's, who does not have it.

Servers differ in their environment variables, and the Hugging Face libraries read theirs while they are imported.
torch and others that take longest read none of them. So the servers of one interpreter are forked themselves, from a
root that has imported these. The root also stands behind an executable file, for what starts `python` by its path.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what the root imports, and what each server
WITHOUT_VARIABLES = (
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch._inductor.compile_fx", "scipy.optimize", "pandas",
    "pyarrow.dataset", "matplotlib.pyplot", "rich.progress",
)  # fmt: skip
PUBLIC = (
    "transformers.trainer", "transformers.models.qwen3.modeling_qwen3", "peft", "trl", "datasets",
    "accelerate.commands.launch", "bitsandbytes",
)  # fmt: skip
LONGEST_REQUEST = 2**17  # bytes


def paths_of(environment) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


PYTHONPATH = paths_of(os.environ)
# The file behind which the root stands. It starts in a moment, without site-packages.
EXECUTABLE = """#!{python} -IS
import json, os, socket, sys
given = dict(words=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd())
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as root:
    root.connect({address!r})
    socket.send_fds(root, [json.dumps(given).encode()], [0, 1, 2])
    code = int(root.recv(100))
sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""


class Root:
    """What servers and processes of an interpreter are forked from.

    Args:
        python (`str`): the interpreter.
        variables: those of the environment that it reads when it starts.
    """

    def __init__(self, python: str, variables: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory(prefix="root-python-")
        self.address, self.executable = f"{self.folder.name}/asked", Path(self.folder.name, "python")
        self.executable.write_text(EXECUTABLE.format(python=python, address=self.address))
        self.executable.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.alive, theirs = socket.socketpair()  # closed when this process ends
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked, theirs:
            asked.bind(self.address)
            asked.listen(100)
            handles = [asked.fileno(), theirs.fileno()]
            words = [python, __file__, *map(str, handles), str(self.executable)]
            subprocess.Popen(words, cwd=ROOT, env=environment | variables, pass_fds=handles)

    def serve(self, environment: dict[str, str]) -> socket.socket:
        """Fork a server with these variables -> the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as root:
            root.connect(self.address)
            request = json.dumps(dict(environment=environment)).encode()
            assert len(request) < LONGEST_REQUEST
            socket.send_fds(root, [request], [theirs.fileno()])
        return ours


@cache
def root_of(python: str, variables: tuple[tuple[str, str], ...]) -> Root:
    return Root(python, dict(variables))


class WarmPython:
    """The server, as seen from a test.

    Args:
        python (`str`, *optional*): an interpreter, of this environment or another one.
        environment (`dict`, *optional*): its environment variables. What libraries read while they are imported
            (HF_HOME, HF_ENDPOINT, HF_DATASETS_CACHE) must stand here.

    Attributes:
        executable (`Path`): a file that does what the interpreter's own does, and starts at once.
    """

    def __init__(self, python: str = sys.executable, environment: dict[str, str] | None = None):
        environment = dict(os.environ if environment is None else environment)
        read_at_start = tuple(sorted(item for item in environment.items() if item[0].startswith("PYTHON")))
        root = root_of(python, read_at_start)
        self.python, self.executable = python, root.executable
        self.outputs = tempfile.TemporaryDirectory(prefix="warm-python-")
        self.socket = root.serve(environment)
        self.stream = self.socket.makefile("rw")

    def ask(self, **request):
        """One question to the server -> its answer."""
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        answer = self.stream.readline()
        assert answer, f"the server of {self.python} died"
        return json.loads(answer)

    def start(self, *words: str, **environment: str) -> "Process":
        """Start what `python *words` would start (`-m MODULE`, `-c CODE` or a path), with more variables."""
        output = tempfile.mkdtemp(prefix="process-", dir=self.outputs.name)
        pid = self.ask(do="start", words=[str(word) for word in words], environment=environment, output=output)
        return Process(self, pid, Path(output))

    def run(self, *words: str, timeout: float = 300, **environment: str) -> tuple[int, str]:
        """Start it and wait -> (exit code, what it printed)."""
        process = self.start(*words, **environment)
        return process.wait(timeout), process.printed()

    def run_ranks(self, count: int, *words: str, timeout: float = 300, **environment: str) -> tuple[int, str]:
        """Start it `count` times, as ranks that torch joins -> (0 or a failed one's exit code, what all printed).

        This is what `torchrun` does, with one difference: its own processes would import everything anew.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        ranks = [self.start(*words, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        deadline = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks) or time.monotonic() > deadline:
                for rank in ranks:  # the others would wait for the one that failed
                    rank.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        codes = [rank.returncode for rank in ranks if rank.returncode]
        printed = "".join(f"rank {number}: {rank.printed()}" for number, rank in enumerate(ranks))
        return codes[0] if codes else 0, printed

    def close(self) -> None:
        """End the server. It also ends by itself when this process does."""
        self.socket.shutdown(socket.SHUT_WR)
        self.stream.read()  # to its end, which is the server's
        self.stream.close()
        self.socket.close()
        self.outputs.cleanup()


class Process:
    """One process of a server: of `subprocess.Popen`'s methods those that the tests use."""

    def __init__(self, python: WarmPython, pid: int, output: Path):
        self.python, self.pid, self.output, self.returncode = python, pid, output, None

    def printed(self) -> str:
        """What it has written so far, first to stdout and then to stderr."""
        files = [self.output / name for name in ("stdout", "stderr")]
        return "".join(path.read_text(errors="replace") for path in files if path.exists())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.python.ask(do="poll", pid=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"not finished after {timeout} s:\n{self.printed()[-6000:]}")
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        self.wait(timeout)
        return self.printed(), None


# ---- the root's side


def import_all(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # so that the forked processes share what is imported here instead of copying it


def wait_for_requests(asked: socket.socket, alive: socket.socket) -> socket.socket:
    """Fork for every request. Returns in the forked process alone -> the connection to who asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for it
    while True:
        ready, *_ = select.select([asked, alive], [], [])
        if alive in ready:
            os._exit(0)  # the tests are over
        connection, _ = asked.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            alive.close()
            return connection
        connection.close()


def run_for(executable: socket.socket, handles: list[int], folder: str) -> None:
    """Fork once more, and tell the executable file's process the exit code. Returns in the fork alone, which has the
    input, the outputs and the folder of that process."""
    child = os.fork()
    if child == 0:
        executable.close()
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
            os.close(handle)
        os.chdir(folder)
        return
    for handle in handles:
        os.close(handle)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            executable.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([executable], [], [], 0.01)[0]:  # it was killed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os._exit(0)


# ---- the server's side


def serve(stream) -> tuple[list[str], dict[str, str], str]:
    """Answer requests for ever. Returns in a forked process alone -> its words, its variables, its output folder."""
    for line in stream:
        request = json.loads(line)
        if request["do"] == "start":
            answer = os.fork()
            if answer == 0:
                return request["words"], request["environment"], request["output"]
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = None if pid == 0 else os.waitstatus_to_exitcode(status)
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
    os._exit(0)  # whoever asked is gone


def print_into(output: str) -> None:
    """Let this process write into files of a folder."""
    for number, path in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)


def become(words: list[str]) -> None:
    """Do in this process what a fresh interpreter would do with these words."""
    sys.stdout.reconfigure(line_buffering=True)  # for who reads along
    isolated = words[0] == "-I"
    first, *rest = words[1:] if words[0] in ("-I", "-u") else words
    beside = str(Path(first).parent.absolute()) if first not in ("-m", "-c") else os.getcwd()
    own = [path for path in sys.path[1:] if path not in PYTHONPATH]
    sys.path[:] = own if isolated else [beside, *paths_of(os.environ), *own]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def finish(code: int) -> None:
    """Leave as the interpreter does, but without taking every imported module apart: that takes two seconds."""
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def live(words: list[str]) -> None:
    """A forked process, from its first line to its exit code."""
    code = 0
    try:
        become(words)
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finish(code)


def main(asked: int, alive: int, executable: str) -> None:
    """The root, and in its forks a server or a process.

    Args:
        asked, alive: handles of sockets: where it is asked, and what the tests close when they are over.
        executable: the file behind which it stands.
    """
    os.chdir(ROOT)
    sys.executable = executable  # also for those that start more
    import_all(WITHOUT_VARIABLES)
    assert "huggingface_hub" not in sys.modules, "it has read the variables of the root"
    connection = wait_for_requests(socket.socket(fileno=asked), socket.socket(fileno=alive))
    request, handles, *_ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
    request = json.loads(request)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "words" in request:
        run_for(connection, handles, request["folder"])
        live(request["words"])
    connection.close()
    import_all(PUBLIC)
    # a table that transformers builds when it first loads a model, in half a second
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("qwen3")
    test = socket.socket(fileno=handles[0])
    stream = test.makefile("rw")
    words, more, output = serve(stream)
    os.close(test.fileno())  # the server's own: a test must see it close when the server dies
    os.environ.update(more)
    print_into(output)
    live(words)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
