"""Start scripts with torchrun so that they stay on this machine, end in time and leave no process behind.

``python launch.py TORCHRUN_ARGUMENTS`` is torchrun, but for one thing: its store listens on the loopback interface
only. As it comes, it listens on all interfaces, whatever ``--local-addr`` says (that is the address it announces).
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import uuid

HERE = pathlib.Path(__file__).parent
PATH = os.pathsep.join(str(p) for p in (HERE.parent.parent / "src", HERE.parent))
MARK = "SINGD_TEST_RUN"


def torchrun(script, processes, *arguments, timeout=100, max_restarts=0):
    """Run a script of this folder; return what ``subprocess.run`` does.

    Raises:
        AssertionError: If a process of the run is still there after torchrun has ended.
        subprocess.TimeoutExpired: If it takes longer than ``timeout`` seconds; all of it is ended then.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, str(HERE / "launch.py"), "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
    command += [str(HERE / script), *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": PATH,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        MARK: mark,
    }
    try:
        done = subprocess.run(
            command, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
        left = still_there(mark)
        assert not left, f"{len(left)} processes left behind: {done.stderr[-3000:]}"
        return done
    finally:
        for pid in processes_of(mark):  # after a failure only
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(mark):
    """The processes that were started with this mark in their environment (which children inherit)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def still_there(mark, patience=5.0):
    """The processes of a run that do not end by themselves, given some seconds."""
    end = time.monotonic() + patience
    while (left := processes_of(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def listening(pids):
    """The addresses on which processes accept connections, as /proc writes them."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A":
                sockets[f"socket:[{columns[9]}]"] = columns[1].split(":")[0]
    found = []
    for pid in pids:
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += [sockets[s] for s in [os.readlink(entry)] if s in sockets]
    return found


def others_can_connect(pids):
    """Whether any of these processes accepts connections that do not come from this machine."""
    addresses = listening(pids)
    assert addresses, "none of them listens at all: the question was put too early"
    return not set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


def main():
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
    from torch.distributed.run import main as run

    store = dist.TCPStore

    def on_loopback(host_name, port, *args, **options):
        if not options.get("is_master"):
            return store(host_name, port, *args, **options)
        server = socket.create_server(("127.0.0.1", port))
        port = server.getsockname()[1]
        return store("127.0.0.1", port, *args, master_listen_fd=server.detach(), **options)

    dist.TCPStore = c10d_rendezvous_backend.TCPStore = on_loopback
    run()


if __name__ == "__main__":
    main()
