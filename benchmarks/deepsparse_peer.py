"""The DeepSparse peer seen from our process: a subprocess that computes only while asked to."""

import json
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.deepsparse_env import DeepSparseUnavailable, ensure_environment

_TIMEOUT_SECONDS = 300


class DeepSparsePeer:
    """One worker process, one compiled layer at a time. A `harness.Contestant` after `compile`.

    Raises:
        DeepSparseUnavailable: with the reason, from the constructor and from every method.
    """

    name = "deepsparse"

    def __init__(self) -> None:
        python = ensure_environment()
        worker = Path(__file__).with_name("deepsparse_worker.py")
        self._folder = tempfile.TemporaryDirectory(prefix="deepsparse-")
        self._log = (Path(self._folder.name) / "stderr.txt").open("w+")
        self._process = subprocess.Popen(
            [python, worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.version: str = self._read()["version"]

    def compile(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Compiles the layer for `x` [rows, in_features] and returns its output.

        DeepSparse 1.8.0 returns garbage for pruned weights and few rows unless in_features is a
        multiple of 16 (ONNX Runtime is right on the same file), so both operands are padded with
        zeros to that. Padding the input is not timed, which is in DeepSparse's favour.
        """
        missing = -x.shape[1] % 16
        if missing:
            x, weight = (torch.nn.functional.pad(t, (0, missing)) for t in (x, weight))
        folder = Path(self._folder.name)
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            np.save(folder / f"{name}.npy", tensor.detach().contiguous().numpy())
        threads = torch.get_num_threads()
        answer = self._ask(op="compile", folder_name=str(folder), threads=threads)
        if answer["threads"] != threads:
            raise DeepSparseUnavailable(f"uses {answer['threads']} threads instead of {threads}")
        return torch.from_numpy(np.load(folder / "y.npy"))

    def time(self, warmup: int, calls: int, flush: bool) -> list[float]:
        return self._ask(op="time", warmup=warmup, calls=calls, flush=flush)["seconds"]

    def release(self) -> None:
        """Frees the compiled layer."""
        self._ask(op="release")

    def close(self) -> None:
        """Ends the worker."""
        if self._process.poll() is None:
            assert self._process.stdin
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, **command: object) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise DeepSparseUnavailable(self._last_words()) from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_SECONDS)
        if not ready:
            self._process.kill()
            raise DeepSparseUnavailable(f"no answer within {_TIMEOUT_SECONDS} s")
        line = self._process.stdout.readline()
        if not line:
            raise DeepSparseUnavailable(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DeepSparseUnavailable(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"worker ended with {code}: {lines[-1][:160] if lines else 'no output'}"
