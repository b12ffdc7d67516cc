"""What a figure was measured on: CPU, instruction set, caches, threads, versions, load."""

import datetime
import importlib.metadata
import os
import platform
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
)


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in reversed(list(pairs))}


def _caches() -> dict[str, str]:
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
        if kind != "Instruction":
            sizes[f"L{level}"] = (index / "size").read_text().strip()
    return sizes


def version_of(package: str) -> str:
    """Installed version of `package`, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def describe() -> dict[str, object]:
    """Machine, thread count, versions and load, as stored with every result."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model_stepping": "/".join(
            info.get(key, "?") for key in ("cpu family", "model", "stepping")
        ),
        "cores": os.cpu_count(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "sparse_compiler": version_of("sparse_compiler"),
    }


def headline(machine: dict[str, object]) -> str:
    """`machine` as the two lines printed above every table."""
    isa, caches, load = machine["isa"], machine["caches"], machine["load_average"]
    assert isinstance(isa, list) and isinstance(caches, dict) and isinstance(load, list)
    cache_text = ", ".join(f"{level} {size}" for level, size in caches.items())
    return (
        f"{machine['date']} | {machine['cpu']} ({machine['cpu_family_model_stepping']}), "
        f"{machine['cores']} cores, {' '.join(isa) or machine['torch_cpu_capability']}, "
        f"{cache_text}\n"
        f"threads {machine['threads']} | load average {' '.join(map(str, load))} | "
        f"python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"transformers {machine['transformers']}, sparse_compiler {machine['sparse_compiler']}"
    )


class LoadMeter:
    """Cores kept busy by processes other than this one and its children, since the last `lap`."""

    def __init__(self) -> None:
        self._last = self._sample()

    @staticmethod
    def _sample() -> tuple[float, float]:
        total = psutil.cpu_times()
        busy = sum(total) - total.idle - getattr(total, "iowait", 0.0)
        # On Linux guest time is already part of user time.
        busy -= getattr(total, "guest", 0.0) + getattr(total, "guest_nice", 0.0)
        me, own = psutil.Process(), 0.0
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                own += times.user + times.system
            except psutil.Error:
                continue
        return busy - own, time.perf_counter()

    def lap(self) -> float:
        """Mean number of cores others used since the last lap; resolution 10 ms of CPU time."""
        busy, now = self._sample()
        last_busy, last_now = self._last
        self._last = (busy, now)
        return max(0.0, (busy - last_busy) / max(now - last_now, 1e-9))
