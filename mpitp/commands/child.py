"""A process of its own for the files of a folder that may be hostile: what they do wrong ends that process alone.

It has limits of memory and of processor time, no MPI, and this side's imports. A question is a line of JSON and bytes
behind it, and so is an answer; one question at a time. While the child works on one, this process goes on: a thread
would not do for the tokenizer, whose library holds the interpreter's lock for as long as it loads.
"""
from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO, Protocol

from ..errors import InputError

# The module's own folder may not be where Python looks first: the modules of mpitp.commands have names of Python's.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from importlib import import_module; " \
          "import_module(sys.argv[1]).serve()"
LAUNCHERS = ("PMI", "PMIX", "OMPI_", "PRTE", "MPI_LOCAL", "HYDRA", "HYDI")      # variables that are the ranks' alone
# glibc's malloc in the child: large pieces at a time, in large pages, kept. Measured: a vocabulary of 262,144 tokens,
# which takes 370 MB, loads in 0.8 times the processor time, with 2,500 page faults for 104,000.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=67108864:glibc.malloc.trim_threshold=2147483648"
Message = tuple[dict[str, Any], bytes]


class Server(Protocol):
    """A Server answers the questions in the child."""

    def answer(self, question: dict[str, Any], data: bytes) -> Message:
        """Answer a question. Raises InputError, whose line the other side raises again."""


class Child:
    """A Child is a process that runs serve() of a module of mpitp.commands, and ends with this one.

    Parameters
    ----------
    module : str
        The module's name within mpitp.commands.
    subject : str
        What the child works on, for messages: a file.
    expected : str
        What is expected of it, where the process does not survive.
    seconds : float, optional
        How long the child may live. None: no limit.
    """

    def __init__(self, module: str, subject: str, expected: str, seconds: float | None = None):
        self.subject, self.expected, self.is_late = subject, expected, False
        environment = {"GLIBC_TUNABLES": MALLOC,
                       **{name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}}
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, f"mpitp.commands.{module}", *sys.path],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env=environment)
        atexit.register(self.close)
        self.clock = threading.Timer(seconds, self.end) if seconds is not None else None
        if self.clock:
            self.clock.daemon = True
            self.clock.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, question: dict[str, Any], data: bytes = b"") -> None:
        """Send a question; finish() has the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):          # finish() says why
            write(self.process.stdin, question, data)

    def finish(self) -> Message:
        """Wait for the answer. Raises InputError with the child's line, or about how the child ended."""
        assert self.process.stdout is not None
        found = read(self.process.stdout)
        if found is None:
            raise InputError(f"{self.subject}: found {self.how_it_ended()}, expected {self.expected}")
        if "error" in found[0]:
            raise InputError(found[0]["error"])
        return found

    def ask(self, question: dict[str, Any], data: bytes = b"") -> Message:
        """Send a question and wait for the answer."""
        self.begin(question, data)
        return self.finish()

    def end(self) -> None:
        """Kill the child, whose time is over."""
        self.is_late = True
        self.process.kill()

    def how_it_ended(self) -> str:
        """Say how a child that no longer answers has ended."""
        status = self.process.wait()
        if self.is_late or status == -signal.SIGXCPU:
            return "no end"
        return f"what ends its process by {signal.Signals(-status).name}" if status < 0 else \
            f"what ends its process with status {status}"

    def close(self) -> None:
        """End the child."""
        atexit.unregister(self.close)
        if self.clock:
            self.clock.cancel()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.kill()                 # it may be in the middle of an answer
        self.process.wait()


def write(stream: BinaryIO | Any, head: dict[str, Any], data: bytes) -> None:
    """Write a message."""
    stream.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n")
    stream.write(data)
    stream.flush()


def read(stream: BinaryIO | Any) -> Message | None:
    """Read a message; None where the stream ends."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    head = json.loads(line)
    data = stream.read(head["bytes"])
    return (head, data) if len(data) == head["bytes"] else None


# --- in the child --------------------------------------------------------------------------------------------------

def serve(server: Server) -> None:
    """Answer the questions on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # the other side answers it, and ends
    with contextlib.suppress(AttributeError, OSError):      # this side may be pinned to a core, which is busy
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr                                 # answers alone may be written there
    while message := read(questions):
        try:
            head, data = server.answer(*message)
        except InputError as error:
            head, data = {"error": error.args[0]}, b""
        write(answers, head, data)


def limit_memory(size: int) -> None:
    """Let this process have so many bytes beside those that it has."""
    limit(size + address_space(), "RLIMIT_AS")


def limit_seconds(seconds: int) -> None:
    """Let this process take so many seconds of processor time beside those that it has taken."""
    limit(seconds + round(time.process_time()), "RLIMIT_CPU")


def limit(value: int, name: str) -> None:
    """Set a soft limit of this process, where the system has it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource                                     # not everywhere
        hard = resource.getrlimit(getattr(resource, name))[1]
        resource.setrlimit(getattr(resource, name), (value if hard < 0 else min(value, hard), hard))


def address_space() -> int:
    """Return the bytes of this process's address space, 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0]
