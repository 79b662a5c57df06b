import os
import signal
import socket
import subprocess
import sys

import pytest

from nested_learning import lock
from nested_learning.lock import InUseError, locked

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+b")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(b"process %d on elsewhere\\n" % os.getpid())
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_and_a_killed_one_gives_way(tmp_path, holder):
    path = tmp_path / ".lock"
    message = f"folder x is in use by process {holder.pid} on elsewhere; wait for it or stop it"
    with pytest.raises(InUseError, match=message), locked(path, "folder x"):
        raise AssertionError("inside")
    assert path.read_text() == f"process {holder.pid} on elsewhere\n"  # left as it was
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(path, "folder x"):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not path.exists()


def test_the_same_process_does_not_get_in_twice(tmp_path):
    with locked(tmp_path / "new" / ".lock", "it"):
        with (
            pytest.raises(InUseError, match=f"in use by process {os.getpid()}"),
            locked(tmp_path / "new" / ".lock", "it"),
        ):
            raise AssertionError("inside")
        assert (tmp_path / "new" / ".lock").exists()
    with locked(tmp_path / "new" / ".lock", "it"):
        pass


ADD = f"""
import runpy, sys
from pathlib import Path
module = runpy.run_path({lock.__file__!r})
locked, InUseError = module["locked"], module["InUseError"]
path, number = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
added = 0
while added < 100:
    try:
        with locked(path, "it"):
            number.write_text(str(int(number.read_text() or 0) + 1))
            added += 1
    except InUseError:
        pass
"""


def test_a_lock_file_that_comes_and_goes_lets_one_in_at_a_time(tmp_path):
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", ADD, str(tmp_path / ".lock"), str(tmp_path / "number")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n")
    assert (tmp_path / "number").read_text() == "200"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / ".lock", "it"):
        pass
    assert "no locks on this file system" in capsys.readouterr().err
