"""Real Python processes that start at once: a server imports the public libraries, and forks for each process.

    python = WarmPython()                                    # imports torch, transformers, ... once
    code, printed = python.run("-m", "hf_specauf.hub", ...)  # what `python -m hf_specauf.hub ...` would do

Importing torch, transformers, trl and peft takes longer than most of what the tests then do in a process. A forked
process has these libraries, and nothing that another process did: no weights, no remote code, no environment variable.
The server never imports this package, so a process may also be a stranger's, who does not have it.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC = (
    "torch.distributed.fsdp", "transformers.trainer", "transformers.models.qwen3.modeling_qwen3", "peft", "trl",
    "datasets", "accelerate.commands.launch", "matplotlib.pyplot", "rich.progress", "bitsandbytes",
)  # fmt: skip


class WarmPython:
    """The server, as seen from a test.

    Args:
        python (`str`, *optional*): an interpreter, of this environment or another one.
        environment (`dict`, *optional*): its environment variables. What libraries read while they are imported
            (HF_HOME, HF_ENDPOINT, HF_DATASETS_CACHE) must stand here.
    """

    def __init__(self, python: str = sys.executable, environment: dict[str, str] | None = None):
        self.outputs = tempfile.TemporaryDirectory(prefix="warm-python-")
        ours, theirs = socket.socketpair()
        self.server = subprocess.Popen(
            [python, __file__, str(theirs.fileno())], cwd=ROOT, env=environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.stream = ours.makefile("rw")
        ours.close()

    def ask(self, **request):
        """One question to the server -> its answer."""
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        answer = self.stream.readline()
        assert answer, f"the server of {self.server.args[0]} died"
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
        self.stream.close()
        self.server.wait()
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
    for name in PUBLIC:
        importlib.import_module(name)
    gc.freeze()  # so that the forked processes share what is imported here instead of copying it
    socket_of_test = socket.socket(fileno=int(sys.argv[1]))
    stream = socket_of_test.makefile("rw")
    process = serve(stream)
    os.close(socket_of_test.fileno())  # the server's own: a test must see it close when the server dies
    live(*process)
