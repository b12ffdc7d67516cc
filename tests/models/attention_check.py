"""Runs a model of `attention_models` compiled, eager and in float64, variant by variant.

A stage is a set of variants that share one model and its compiled graphs:

- forward: no padding mask, a mask of ones, right padding, left padding; no cache.
- cache: a dynamic cache filled by one call; with left padding; and a call that continues a cache.
- decode: a static cache, prefill and single tokens; the same with left padding.
- train: gradients of all parameters, without a mask and with right padding.

The reference is the same model, the same implementation, uncompiled, in float64 throughout (`_Wide`
stops it from going to float32 for its softmax). A compiled result may be off by `SLACK` times what
the eager float32 model is off, and `FLOOR` of the tensor's largest value.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from sparse_compiler import backend
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext, Rewrite

if TYPE_CHECKING:
    from attention_models import Subject

SLACK = 4.0
FLOOR = 1e-5
# A gradient that is zero but for rounding (a key's bias) is compared with the model's largest one.
SMALLEST_GRADIENT = 1e-3
CACHE_LENGTH = 256
PREFILL = 130
STEPS = 4

STAGES = {
    "forward": ("none", "ones", "right", "left"),
    "cache": ("cache", "cache left", "continue"),
    "decode": ("decode", "decode left"),
    "train": ("train", "train right"),
}
# "passes" runs what the passes made of the graph without compiling it: seconds instead of minutes.
WAYS = ("passes", "sparse", "inductor")
KINDS = ("attention", "linear_attention")
ALWAYS = {"selection": "always", "on_error": "raise"}

Named = dict[str, torch.Tensor]
Forward = Callable[..., Any]


@dataclasses.dataclass
class Outcome:
    """What became of one variant.

    Attributes:
        variant: "IMPLEMENTATION VARIANT", such as "sdpa left".
        graphs: graphs compiled for it; 0 if those of an earlier variant served.
        dynamo_graphs: graphs that Dynamo hands to any backend for it.
        sites: softmaxes and scaled dot product attentions in the compiled graphs.
        rewrites: verdicts on attention, in the order of the graphs.
        error: largest error of a compiled tensor against float64, relative to its largest value.
        eager_error: that of the same tensor in the eager float32 model.
        worst: name of that tensor.
        wrong: sentences; empty if everything agreed.
        excuse: why it was not tried: Dynamo fails on the model, or changes it, with any backend.
        seconds: compiling and running.
    """

    variant: str
    graphs: int = 0
    dynamo_graphs: int = 0
    sites: int = 0
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    error: float = 0.0
    eager_error: float = 0.0
    worst: str = ""
    wrong: list[str] = dataclasses.field(default_factory=list)
    excuse: str = ""
    seconds: float = 0.0


class _Wide(TorchFunctionMode):
    """Makes float64 of every float32 that is asked for, so that a model can be run in float64."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*(wide(value) for value in args), **named)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def padding(kind: str, length: int, boolean: bool = False) -> torch.Tensor:
    """[2, length]: the second row is padded by 37 tokens on the side that `kind` names."""
    mask = torch.ones(2, length, dtype=torch.bool if boolean else torch.long)
    if kind == "right":
        mask[1, -37:] = 0
    elif kind == "left":
        mask[1, :37] = 0
    return mask


def tensors(value: Any, name: str = "output") -> Named:
    """All floating point tensors in an output, caches included, by name."""
    found: Named = {}
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            found[name] = value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            found |= tensors(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            found |= tensors(part, f"{name}.{index}")
    elif hasattr(value, "self_attention_cache"):
        found |= tensors(value.self_attention_cache, f"{name}.self")
        found |= tensors(value.cross_attention_cache, f"{name}.cross")
    elif hasattr(value, "layers"):
        for index, layer in enumerate(value.layers):
            found |= tensors([layer.keys, layer.values], f"{name}.{index}")
    return found


class _Runs:
    """The variants of one model, each a function of the forward to call."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject = subject
        self.model = model
        self.inputs = {k: self._like(v) for k, v in subject.inputs().items()}
        self.cached = "cache" in subject.stages

    def _like(self, value: Any) -> Any:
        wide = next(self.model.parameters()).dtype == torch.float64
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if wide and floats else value

    def variants(self, stage: str) -> tuple[str, ...]:
        masked = self.subject.mask is not None
        return tuple(v for v in STAGES[stage] if masked or v in ("none", "cache", "train"))

    def run(self, variant: str, forward: Forward) -> Named:
        kind = variant.rpartition(" ")[2]
        if variant.startswith("decode"):
            return self._decode(forward, kind)
        if variant.startswith("train"):
            return self._train(forward, kind)
        with torch.no_grad():
            if variant == "continue":
                return self._continue(forward)
            cached = {"use_cache": variant.startswith("cache")} if self.cached else {}
            return tensors(forward(**self.inputs, **self._mask(kind), **cached))

    def _mask(self, kind: str, length: int | None = None) -> dict[str, torch.Tensor]:
        subject = self.subject
        if kind not in ("ones", "right", "left") or subject.mask is None:
            return {}
        mask = padding(kind, subject.length, subject.boolean_mask)
        return {subject.mask: mask if length is None else mask[:, :length]}

    def _train(self, forward: Forward, kind: str) -> Named:
        self.model.train()
        uncached = {"use_cache": False} if self.cached else {}
        found = tensors(forward(**self.inputs, **self._mask(kind), **uncached))
        loss = sum(
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view_as(y)).mean()
            for y in found.values()
        )
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        self.model.eval()
        outputs = {name: y.detach() for name, y in found.items()}
        named = zip(parameters, gradients, strict=True)
        return outputs | {f"grad {name}": g for name, g in named if g is not None}

    def _continue(self, forward: Forward) -> Named:
        """Two calls with one dynamic cache: the second has more keys than queries."""
        ids, others = self._split_ids()
        first = forward(input_ids=ids[:, :70], use_cache=True, **others)
        cache = first.past_key_values
        second = forward(
            input_ids=ids[:, 70:PREFILL], past_key_values=cache, use_cache=True, **others
        )
        return tensors({"first": first.logits, "second": second.logits})

    def _decode(self, forward: Forward, kind: str) -> Named:
        """A prefill and single tokens into one static cache."""
        from transformers import StaticCache

        ids, others = self._split_ids()
        found: Named = {}
        with torch.no_grad():
            cache = StaticCache(config=self.model.config, max_cache_len=CACHE_LENGTH)
            # The shapes of a cache follow from the model; `generate` has it ready before compiling.
            self.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **others)
            cache.reset()
            for step in range(STEPS + 1):
                start, stop = (0, PREFILL) if step == 0 else (PREFILL + step - 1, PREFILL + step)
                output = forward(
                    input_ids=ids[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                    **self._mask(kind, stop),
                    **others,
                )
                found[f"step {step}"] = output.logits.clone()
        return found

    def _split_ids(self) -> tuple[torch.Tensor, dict[str, Any]]:
        others = dict(self.inputs)
        return others.pop("input_ids"), others


class _Watched:
    """A backend of one of the `WAYS` that notes what it compiles."""

    def __init__(self, way: str, options: Mapping[str, Any]) -> None:
        self.way = way
        self.options = dict(options)
        self.graphs = 0
        self.records: list[backend.CompiledGraph] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Forward:
        self.graphs += 1
        if self.way == "dynamo":
            return gm
        if self.way == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(gm, inputs)
        if self.way == "sparse":
            return backend.sparse(gm, inputs, options=self.options)
        parsed = Options.parse(self.options)
        training = torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
        )
        record = backend._rewrite(gm, inputs, PassContext(parsed, training, AlwaysSelector()))
        self.records.append(record)
        return record.after if record.after.meta.get("edits") else gm

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        backend.listeners.append(self.records.append)
        try:
            yield
        finally:
            backend.listeners.remove(self.records.append)


def _sites(record: backend.CompiledGraph) -> int:
    names = (str(node.target) for node in record.before.graph.nodes if node.op == "call_function")
    return sum("softmax" in name or "scaled_dot_product_attention" in name for name in names)


def _error(got: torch.Tensor, want: torch.Tensor, scale: float) -> float:
    """Largest difference over `scale`; infinite where only one of them is finite."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return math.inf
    return float((got.double() - want)[finite].abs().max()) / scale if finite.any() else 0.0


def _compare(outcome: Outcome, got: Named, eager: Named, wide: Named) -> None:
    if set(got) != set(wide):
        outcome.wrong.append(f"outputs or gradients differ: {sorted(set(got) ^ set(wide))}")
        return
    sizes = {
        name: float(t[t.isfinite()].abs().max()) if t.numel() else 0.0 for name, t in wide.items()
    }
    largest = max((size for name, size in sizes.items() if name.startswith("grad")), default=0.0)
    worst = -1.0
    for name, want in wide.items():
        least = SMALLEST_GRADIENT * largest if name.startswith("grad") else 0.0
        scale = max(sizes[name], least, 1e-30)
        if got[name].shape != want.shape or got[name].dtype != eager[name].dtype:
            outcome.wrong.append(f"{name} is {got[name].dtype} {list(got[name].shape)}")
            continue
        error, eager_error = _error(got[name], want, scale), _error(eager[name], want, scale)
        share = error / (SLACK * eager_error + FLOOR)
        if not share <= 1:
            outcome.wrong.append(f"{name} is off by {error:.1e}, in eager by {eager_error:.1e}")
        if not share <= worst:
            worst = share
            outcome.error, outcome.eager_error, outcome.worst = error, eager_error, name


def check(
    subject: Subject,
    implementation: str,
    stage: str,
    way: str = "passes",
    options: Mapping[str, Any] = ALWAYS,
    prepare: Callable[[nn.Module, dict[str, Any]], nn.Module] | None = None,
) -> list[Outcome]:
    """Run every variant of a stage; nothing is raised but errors of the model or of the compiler.

    Args:
        subject: of `attention_models.MODELS`.
        implementation: one of `subject.implementations`.
        stage: one of `subject.stages`.
        way: one of `WAYS`.
        options: of the backend, for "passes" and "sparse".
        prepare: replaces a model before it is compiled, given the inputs; may edit it in place.

    Returns:
        An outcome for each variant, in order: later ones may have used the graphs of earlier ones.
    """
    model = subject.build(implementation)
    runs = _Runs(subject, model)
    exact = _Runs(subject, _widened(model))
    variants = runs.variants(stage)
    eager, wide = {}, {}
    for variant in variants:
        eager[variant] = runs.run(variant, model)
        with _float64():
            wide[variant] = exact.run(variant, exact.model)
    outcomes = [Outcome(f"{implementation} {variant}") for variant in variants]
    plain = _Watched("dynamo", {})
    for variant, outcome in zip(variants, _each(outcomes, plain), strict=True):
        outcome.excuse = _excuse(runs, variant, plain, eager[variant], wide[variant])
        outcome.dynamo_graphs = plain.graphs
    if prepare is not None:
        runs.model = model = prepare(model, runs.inputs)
    watched = _Watched(way, options)
    with watched.listening():
        forward = _compile(model, watched)
        for variant, outcome in zip(variants, _each(outcomes, watched), strict=True):
            if outcome.excuse and prepare is None:
                continue
            started = time.perf_counter()
            got = runs.run(variant, forward)
            outcome.seconds = time.perf_counter() - started
            outcome.graphs = watched.graphs
            outcome.sites = sum(map(_sites, watched.records))
            verdicts = [r for record in watched.records for r in record.rewrites]
            outcome.rewrites = [r for r in verdicts if r.kind in KINDS]
            _compare(outcome, got, eager[variant], wide[variant])
    torch._dynamo.reset()
    return outcomes


def _excuse(runs: _Runs, variant: str, plain: _Watched, eager: Named, wide: Named) -> str:
    """Whether Dynamo alone, with a backend that does nothing, can do the variant."""
    probe = Outcome(variant)
    try:
        _compare(probe, runs.run(variant, _compile(runs.model, plain)), eager, wide)
    except Exception as error:  # whatever it is, it is not ours
        return f"Dynamo alone fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return f"Dynamo alone gives another result: {probe.wrong[0]}" if probe.wrong else ""


def _widened(model: nn.Module) -> nn.Module:
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        # Grouped products know no float64.
        wide.set_experts_implementation("eager")
    return wide


def _compile(model: nn.Module, watched: _Watched) -> Forward:
    return torch.compile(model, backend=watched)


def _each(outcomes: list[Outcome], watched: _Watched) -> Iterator[Outcome]:
    """The outcomes one by one, from a Dynamo that knows nothing; counts start anew at each."""
    torch._dynamo.reset()
    for outcome in outcomes:
        watched.graphs = 0
        watched.records.clear()
        yield outcome


def complaints(subject: Subject, outcomes: Sequence[Outcome]) -> list[str]:
    """What is wrong with the outcomes of a stage, in sentences; empty if nothing is."""
    found = [f"{o.variant}: {sentence}" for o in outcomes for sentence in o.wrong[:3]]
    graphs, least = sum(o.graphs for o in outcomes), sum(o.dynamo_graphs for o in outcomes)
    if graphs > least:
        found.append(f"{graphs} graphs were compiled, Inductor compiles {least}")
    for outcome in outcomes:
        found += _unexpected(subject, outcome)
    return found


def _unexpected(subject: Subject, outcome: Outcome) -> list[str]:
    expected = subject.expected or {}
    variant = outcome.variant.partition(" ")[2]
    wanted = expected.get(outcome.variant, expected.get(variant))
    if wanted is None or not outcome.graphs:
        return []
    if len(outcome.rewrites) != len(wanted):
        return [f"{outcome.variant}: {len(outcome.rewrites)} verdicts on {len(wanted)} sites"]
    found = []
    for number, (rewrite, pattern) in enumerate(zip(outcome.rewrites, wanted, strict=True)):
        same = rewrite.applied == (pattern is not None) and (pattern or "") in rewrite.pattern
        if not same:
            what = f"{rewrite.pattern or 'no pattern'}, {'' if rewrite.applied else 'not '}applied"
            found.append(
                f"{outcome.variant}: site {number} should be {pattern or 'left'}, is {what} "
                f"({rewrite.reason})"
            )
    return found


def available(subject: Subject) -> bool:
    """Whether the packages of a model are installed."""
    return subject.package is None or importlib.util.find_spec(subject.package) is not None
