"""One command line run by several processes at once, which share the work of a folder (qk.search.parts)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def sharing(processes: int) -> Iterator[None]:
    """Runs this command line so many times at once, this one among them, until the block ends; each has its part of the
    threads. Those that are not done when this one is are ended: nothing is left for them to do.
    """
    if processes == 1:
        yield
        return
    threads = torch.get_num_threads()
    share = max(1, threads // processes)
    command = [sys.executable, "-m", "qk.cli", *sys.argv[1:], "--assists"]
    environment = os.environ | {"OMP_NUM_THREADS": str(share)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    helpers = [subprocess.Popen(command, **quiet) for _ in range(processes - 1)]
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        failed = sum(helper.poll() not in (None, 0) for helper in helpers)
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()
        if failed:
            print(f"{failed} of {len(helpers)} helpers ended with an error", file=sys.stderr)
