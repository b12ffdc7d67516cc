"""Peak memory of one sliding-window attention in a fresh process.

`peak(...)` starts the process, `python -m benchmarks.attention_memory BACKEND LENGTH WINDOW`. The
process may not take more than `MOST_BYTES`: a dense mask of 65 536 tokens would take the machine.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, WINDOW = 65536, 256
TARGET_MIB = 2e9 / 2**20
MOST_BYTES = 12 << 30


def peak(backend: str, length: int = LENGTH, window: int = WINDOW) -> dict[str, Any]:
    """Peak resident memory of the whole process, torch and compiling included.

    Returns:
        {"peak_mib", "before_mib" (inputs are made, nothing is compiled), "seconds" (a call)}, or
        {"error": sentence}.
    """
    command = [sys.executable, "-m", "benchmarks.attention_memory", backend]
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [*command, str(length), str(window)], cwd=root, capture_output=True, text=True
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"ended with {result.returncode}"}
    return json.loads(result.stdout.strip().splitlines()[-1])


def _peak_mib() -> float:
    # Not `getrusage`: its peak outlives exec, so a child starts with that of its parent.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _main(backend: str, length: int, window: int) -> None:
    import torch

    from benchmarks import attention_cases as cases

    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    case = cases.Case(cases.window(window), length)
    compiled = torch.compile(cases.sdpa(case), backend=backend, fullgraph=True, dynamic=False)
    inputs = case.inputs()
    before = _peak_mib()
    with torch.no_grad():
        compiled(*inputs)
        start = time.perf_counter()
        compiled(*inputs)
        seconds = time.perf_counter() - start
    print(json.dumps({"peak_mib": _peak_mib(), "before_mib": before, "seconds": seconds}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
