"""Makes the separate environment of the DeepSparse peer: `python -m benchmarks.deepsparse_env`.

DeepSparse 1.8.0 has wheels up to Python 3.11 and needs older numpy and onnx than we do, so it lives
in `.venv-deepsparse` beside the project and is spoken to over a pipe (`deepsparse_peer.py`).
"""

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "1.8.0"
ENVIRONMENT = Path(__file__).parent.parent / ".venv-deepsparse"
_READY = ENVIRONMENT / f"deepsparse-{VERSION}-ready"
# Its own requirements ask for an onnx that no longer builds; these versions work with it.
_WITHOUT_DEPENDENCIES = ("deepsparse==1.8.0", "sparsezoo==1.8.1")
_DEPENDENCIES = (
    *("numpy<2", "onnx==1.15.0", "onnxruntime==1.17.*", "scipy", "protobuf"),
    *("pydantic~=2.0", "click", "pyyaml", "tqdm", "requests", "psutil", "py-machineid", "geocoder"),
)


class DeepSparseUnavailable(RuntimeError):
    """The peer cannot run here; the message says why."""


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [
            line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()
        ]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "")
        tail = reason or (lines[-1] if lines else "no output")
        raise DeepSparseUnavailable(f"{Path(command[0]).name} failed: {tail[:160]}")


def _python311() -> str:
    if sys.version_info[:2] == (3, 11):
        return sys.executable
    found = shutil.which("python3.11")
    if found is None:
        raise DeepSparseUnavailable("DeepSparse needs Python 3.11, and there is no python3.11 here")
    return found


def ensure_environment() -> Path:
    """The interpreter of the DeepSparse environment, which is made on first use (a minute).

    Raises:
        DeepSparseUnavailable: there is no Python 3.11, or an installation failed.
    """
    python = ENVIRONMENT / "bin" / "python"
    if _READY.exists():
        return python
    print(f"making {ENVIRONMENT.name} for DeepSparse {VERSION} ...", file=sys.stderr, flush=True)
    base = _python311()
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    _run(base, "-m", "venv", ENVIRONMENT)
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", *_WITHOUT_DEPENDENCIES)
    _run(python, "-m", "pip", "install", "--quiet", *_DEPENDENCIES)
    _run(python, "-c", "import deepsparse, onnx")
    _READY.touch()
    return python


if __name__ == "__main__":
    try:
        print(ensure_environment().relative_to(ENVIRONMENT.parent))
    except DeepSparseUnavailable as error:
        raise SystemExit(str(error)) from None
