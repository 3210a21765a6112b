"""Programs in processes of their own, without the seconds that a new interpreter takes to import torch.

They are forks of a server, which `start` forks once the modules are imported and before a test computes anything: torch does
not differentiate in the fork of a process that has done so with threads.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import torch

_server: socket.socket | None = None


class Forked:
    """Counterpart of subprocess.Popen for `python *command` (-c code, -m module or a script), with pipes for its output.

    The process has the modules that were imported when the server started, one thread, and a new interpreter's handlers of
    signals; where `closed` names any of 0, 1 and 2, it has not these streams.
    """

    def __init__(self, command, *, cwd, env=None, closed=(), start_new_session=False):
        self.returncode = None
        pipes = [os.pipe() for _ in range(3)]
        order = {"command": [str(word) for word in command], "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        order |= {"closed": closed, "start_new_session": start_new_session}
        socket.send_fds(_server, [json.dumps(order).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr, self._state = (open(read) for read, _ in pipes)  # noqa: SIM115
        self.pid = int(self._state.readline())

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._state], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("forked", timeout)
            self.returncode = int(self._state.readline())
            self._state.close()
        return self.returncode

    def communicate(self, timeout=None):
        found = {}

        def read(stream):
            found[stream] = stream.read()

        readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in (self.stdout, self.stderr)]
        end = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("forked", timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return found[self.stdout], found[self.stderr]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start():
    """Fork the server, which ends with this process."""
    global _server
    _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            _server.close()
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()


def _serve(orders):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel cleans up
    while True:
        message, pipes, *_ = socket.recv_fds(orders, 2**20, 3)
        if not message:
            return
        if os.fork() == 0:
            orders.close()
            _supervise(json.loads(message), *pipes)
            return
        for descriptor in pipes:
            os.close(descriptor)


def _supervise(order, out, error, state):
    """Say the number of the process that does it, and its exit status when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            _become_a_new_process(order, out, error)
            status = _run(order["command"])
        finally:
            os._exit(status)
    os.write(state, f"{process}\n".encode())
    os.close(out)
    os.close(error)
    _, status = os.waitpid(process, 0)
    os.write(state, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become_a_new_process(order, out, error):
    if order["start_new_session"]:
        os.setsid()
    os.chdir(order["cwd"])
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (error, 2)):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in order["closed"]:
        os.close(number)
    sys.stdin, sys.stdout, sys.stderr = (
        None if number in order["closed"] else open(number, mode, buffering=1)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # those of a pool do not come along
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[:0] = [os.getcwd(), *filter(None, order["env"].get("PYTHONPATH", "").split(":"))]


def _run(command):
    """Exit status."""
    kind, *arguments = command
    status = 0
    try:
        if kind == "-c":
            code, *arguments = arguments
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    return status
