"""Compile time and peak memory of one model and backend, in a fresh process with empty caches.

`cold_start(...)` starts the process, `python -m benchmarks.cold_start MODEL PRUNING BACKEND`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def cold_start(model: str, pruning: str, backend: str) -> dict[str, Any]:
    """Seconds until the first result of each phase, and the peak memory from compiling on.

    Returns:
        {"compile_seconds": {phase: s}, "peak_mib": float, "loaded_mib": float}, or
        {"error": sentence}.
    """
    with tempfile.TemporaryDirectory(prefix="cold-start-") as folder:
        # Inductor's caches and everything else that follows the XDG convention start empty.
        fresh = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "XDG_CACHE_HOME": f"{folder}/cache",
        }
        command = [sys.executable, "-m", "benchmarks.cold_start", model, pruning, backend]
        root = Path(__file__).parent.parent
        result = subprocess.run(
            command, cwd=root, env={**os.environ, **fresh}, capture_output=True, text=True
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"ended with {result.returncode}"}
    return json.loads(result.stdout.strip().splitlines()[-1])


def _memory(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def _main(model_name: str, pruning: str, backend: str) -> None:
    import torch

    from benchmarks.models import load, phases

    model = load(model_name, pruning)
    loaded = _memory("VmRSS")
    # Loading dequantizes and prunes; forget that peak.
    _CLEAR.write_text("5")
    forward = torch.compile(model, backend=backend)
    seconds = {}
    with torch.no_grad():
        for phase, step in phases(model_name, model, forward).items():
            start = time.perf_counter()
            step()
            seconds[phase] = time.perf_counter() - start
            step()
    answer = {"compile_seconds": seconds, "peak_mib": _memory("VmHWM"), "loaded_mib": loaded}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
