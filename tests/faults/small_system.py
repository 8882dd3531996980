"""A script in a system that has little: `small_system.py '{"shared_memory": "1m"}' SCRIPT <arguments of the script>`.

shared_memory   size of /dev/shm, for this process and its children alone
files           how many more files this process may open, and each of its children
memory          how many more MiB of addresses this process may have, and each of its children
"""

import ctypes
import json
import os
import resource
import runpy
import subprocess
import sys

CLONE_NEWNS = 0x20000


def shrink_shared_memory(size: str) -> None:
    """Mounts another file system on /dev/shm, which no other process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    if "shared_memory" in plan:
        shrink_shared_memory(plan["shared_memory"])
    if "files" in plan:
        limit = len(os.listdir("/proc/self/fd")) + plan["files"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if "memory" in plan:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + plan["memory"] * 2**20,) * 2)
    sys.argv.pop(0)
    if sys.argv[0] != "nothing":
        runpy.run_path(sys.argv[0], run_name="__main__")
