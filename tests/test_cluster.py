""".ci/cluster: one line where it cannot run, and nothing that stays behind, however it ends.

What it runs on its hosts is not run here: tests/cluster/checks.py.
"""
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from spmd import ROOT

pytestmark = pytest.mark.launcher
SCRIPT = ROOT / ".ci" / "cluster"
KNOWN = ("uname", "id", "unshare", "setpriv", "nsenter", "ip", "apt-get", "dirname", "env", "bash")


@pytest.mark.parametrize("name, prints, words", [
    ("id", "1000", "needed root"), ("uname", "Darwin", "found Darwin"), ("ip", None, "found no ip, needed util-linux"),
    ("apt-get", None, "needed Debian"), ("unshare", "refused", "found no namespaces")])
def test_where_it_cannot_run_it_says_so_in_one_line(tmp_path, name, prints, words):
    """Left out is not failed: status 0."""
    for program in KNOWN:
        path = tmp_path / program
        if program != name:
            real = f"/{'usr/' if os.path.exists(f'/usr/bin/{program}') else 'usr/s'}bin/{program}"
            path.write_text({"id": "#!/bin/sh\necho 0\n", "uname": "#!/bin/sh\necho Linux\n"}.get(
                program, f'#!/bin/sh\nexec {real} "$@"\n'))
        elif prints:
            path.write_text(f"#!/bin/sh\necho {prints}\nexit {int(prints == 'refused')}\n")
        if path.exists():
            path.chmod(0o755)
    done = subprocess.run(["/bin/bash", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True,
                          timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("cluster: left out, ") and words in done.stdout, done
    assert done.stdout.count("\n") == 1 and not done.stderr


def processes():
    """{number: number of the parent} of all processes that this one sees."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):                      # it has ended
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def descendants(number):
    parents, found = processes(), {number}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def mounts_and_links():
    links = sorted(os.listdir("/sys/class/net"))
    return Path("/proc/self/mounts").read_text(), links, sorted(os.listdir("/mnt"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, "a host dies"])
def test_nothing_stays_behind(how):
    """The hosts are up, then the script is interrupted, killed outright, or fails."""
    before = mounts_and_links()
    script = subprocess.Popen([SCRIPT, "--hosts-only"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              start_new_session=True)
    line = script.stdout.readline()
    if "left out" in line:
        pytest.skip(line.strip())
    assert "hosts are up" in line, line + script.communicate(timeout=30)[0]
    inside = descendants(script.pid)
    assert len(inside) > 8                                      # three hosts, each with a process or more of its own
    if how == "a host dies":
        first = [number for number in inside if b"/lab/host.sh" in Path(f"/proc/{number}/cmdline").read_bytes()]
        os.kill(min(first), signal.SIGKILL)
    else:
        os.kill(script.pid, how)
    out, _ = script.communicate(timeout=30)
    assert script.returncode != 0, out
    until = time.monotonic() + 10
    while inside & set(processes()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not inside & set(processes()) and mounts_and_links() == before
