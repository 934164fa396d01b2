"""Real Python processes that start at once: a server imports the public libraries, and forks for each process.

    python = WarmPython()                                    # imports torch, transformers, ... once
    code, printed = python.run("-m", "hf_specauf.hub", ...)  # what `python -m hf_specauf.hub ...` would do

Importing torch, transformers, trl and peft takes longer than most of what the tests then do in a process. A forked
process has these libraries, and nothing that another process did: no weights, no remote code, no environment variable.
The server never imports this package, so a process may also be a stranger's, who does not have it.

Servers differ in their environment variables, and the Hugging Face libraries read theirs while they are imported.
torch and others that take longest read none of them. So the servers of one interpreter are forked themselves, from a
root that has imported these.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
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


@cache
def root_of(python: str, variables: tuple[tuple[str, str], ...]) -> socket.socket:
    """Start the root of an interpreter and of the variables that it reads as it starts -> who asks it for servers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [python, __file__, str(theirs.fileno())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.Popen(words, cwd=ROOT, env=environment | dict(variables), pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


class WarmPython:
    """The server, as seen from a test.

    Args:
        python (`str`, *optional*): an interpreter, of this environment or another one.
        environment (`dict`, *optional*): its environment variables. What libraries read while they are imported
            (HF_HOME, HF_ENDPOINT, HF_DATASETS_CACHE) must stand here.
    """

    def __init__(self, python: str = sys.executable, environment: dict[str, str] | None = None):
        self.python, self.outputs = python, tempfile.TemporaryDirectory(prefix="warm-python-")
        environment = dict(os.environ if environment is None else environment)
        read_at_start = tuple(sorted(item for item in environment.items() if item[0].startswith("PYTHON")))
        self.socket, theirs = socket.socketpair()
        request = json.dumps(environment).encode()
        assert len(request) < LONGEST_REQUEST
        socket.send_fds(root_of(python, read_at_start), [request], [theirs.fileno()])
        theirs.close()
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


def give_birth(asked: socket.socket) -> tuple[dict[str, str], socket.socket]:
    """Fork a server for every request. Returns in a server alone -> its variables, its connection to the test."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a server
    while True:
        request, handles, *_ = socket.recv_fds(asked, LONGEST_REQUEST, 1)
        if not request:
            os._exit(0)  # whoever asked is gone
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asked.close()
            return json.loads(request), socket.socket(fileno=handles[0])
        os.close(handles[0])


def import_all(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # so that the forked processes share what is imported here instead of copying it


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


def become(words: list[str], environment: dict[str, str], output: str) -> None:
    """Do in this process what a fresh interpreter would do with these words."""
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)  # for who reads along
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], os.getcwd()
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = words, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def finish(code: int) -> None:
    """Leave as the interpreter does, but without taking every imported module apart: that takes two seconds."""
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def live(words: list[str], environment: dict[str, str], output: str) -> None:
    """A forked process, from its first line to its exit code."""
    code = 0
    try:
        become(words, environment, output)
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finish(code)


if __name__ == "__main__":
    os.chdir(ROOT)
    import_all(WITHOUT_VARIABLES)
    assert "huggingface_hub" not in sys.modules, "it has read the variables of the root"
    variables, socket_of_test = give_birth(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(variables)
    import_all(PUBLIC)
    # a table that transformers builds when it first loads a model, in half a second
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("qwen3")
    stream = socket_of_test.makefile("rw")
    process = serve(stream)
    os.close(socket_of_test.fileno())  # the server's own: a test must see it close when the server dies
    live(*process)
