"""Runs inside the DeepSparse environment: compiles linear layers and times itself on request.

One JSON object a line, in on stdin and out on stdout; arrays travel as .npy files. Imports nothing
of the project (another environment, another numpy). Commands:

    {"op": "compile", "folder_name": ..., "threads": n}
        reads x.npy, weight.npy, bias.npy; writes y.npy
    {"op": "time", "warmup": n, "calls": n, "flush": bool}
    {"op": "release"}

DeepSparse neither spins nor burns CPU while no call runs (measured: 0.00 s of CPU time in 2 s
between calls), and its threads keep the whole process's CPU set, so an idle worker does not disturb
the others.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "True"
# DeepSparse prints a banner on stdout; keep the real one for the protocol.
_PROTOCOL = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import deepsparse  # type: ignore[import-not-found]  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # type: ignore[import-not-found]  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

_FLUSH_BYTES = 128 << 20


def _linear_model(weight: np.ndarray, bias: np.ndarray, rows: int) -> Any:
    """x [rows, in] -> x @ weight.T + bias as one Gemm (MatMul + Add is as fast, also in 3-D)."""
    out_features, in_features = weight.shape
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, out_features])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model


class Worker:
    """One compiled layer at a time."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.inputs: list[np.ndarray] = []
        self.flush_buffer: np.ndarray | None = None

    def compile(self, folder_name: str, threads: int) -> dict[str, Any]:
        folder = Path(folder_name)
        x = np.load(folder / "x.npy")
        model = _linear_model(
            np.load(folder / "weight.npy"), np.load(folder / "bias.npy"), x.shape[0]
        )
        path = str(folder / "linear.onnx")
        onnx.save(model, path)
        self.release()
        start = time.perf_counter()
        self.engine = deepsparse.Engine(path, batch_size=x.shape[0], num_cores=threads)
        seconds = time.perf_counter() - start
        self.inputs = [x]
        np.save(folder / "y.npy", self.engine.run(self.inputs)[0])
        return {"compile_seconds": seconds, "threads": self.engine.num_cores}

    def time(self, warmup: int, calls: int, flush: bool) -> dict[str, Any]:
        for _ in range(warmup):
            self.engine.run(self.inputs, val_inp=False)
        seconds = []
        for _ in range(calls):
            if flush:
                self._flush()
            start = time.perf_counter()
            self.engine.run(self.inputs, val_inp=False)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def release(self) -> dict[str, Any]:
        self.engine, self.inputs = None, []
        return {}

    def _flush(self) -> None:
        if self.flush_buffer is None:
            self.flush_buffer = np.zeros(_FLUSH_BYTES // 4, np.float32)
        self.flush_buffer += 1.0


def main() -> None:
    worker = Worker()
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "compile": worker.compile,
        "time": worker.time,
        "release": worker.release,
    }
    print(json.dumps({"version": deepsparse.__version__}), file=_PROTOCOL, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = operations[command.pop("op")](**command)
        except Exception as error:  # the parent prints it in the table and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=_PROTOCOL, flush=True)


if __name__ == "__main__":
    main()
