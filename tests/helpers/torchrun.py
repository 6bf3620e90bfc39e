"""Start a script on several processes, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def torchrun(*command: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments until all processes have ended; return its status and what it printed."""
    return subprocess.run(
        [sys.executable, "-W", "error", *LAUNCH, str(processes), *command],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
