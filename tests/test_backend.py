"""The backend as a whole: what reaches Inductor, what is refused, and that nothing breaks."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from helpers import ALWAYS, compiled, listening, prune_layers, pruned
from torch import nn

import sparse_compiler as sc
from sparse_compiler import backend
from sparse_compiler.codegen import cpp
from sparse_compiler.formats import csr

OUT, IN, ROWS = 64, 32, 4


@pytest.fixture
def records():
    torch._dynamo.reset()
    with listening() as found:
        yield found


def make(density=0.2, dtype=torch.float32, bias=True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(pruned(OUT, IN, density).to(dtype))
    return model


def program(text: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.strip()


def test_no_import_is_needed_and_naming_the_backend_does_not_load_inductor():
    printed = program(
        """
        import sys, torch
        model = torch.nn.Linear(4, 4)
        compiled = torch.compile(model, backend="sparse", options={"selection": "model"})
        import sparse_compiler
        print("torch._inductor.lowering" in sys.modules, "sparse_compiler.codegen" in sys.modules)
        with torch.no_grad():
            compiled(torch.randn(2, 4))
        print("torch._inductor.lowering" in sys.modules, "sparse_compiler.backend" in sys.modules)
        """
    )
    assert printed.split() == ["False", "False", "True", "True"]


def test_without_triton():
    printed = program(
        """
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocked())
        import torch
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 64)
        model.weight.data *= torch.rand(64, 32) < 0.2
        options = {"selection": "always", "on_error": "raise"}
        compiled = torch.compile(model, backend="sparse", options=options)
        x = torch.randn(4, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        print("triton" in sys.modules)
        """
    )
    assert printed == "False"


def test_a_model_without_zeros_is_inductors(records):
    model, x = make(1.0), torch.randn(ROWS, IN)
    function = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))
    (record,) = records
    assert not hasattr(record.call, "refresh")  # no guard around Inductor's callable
    assert not record.after.meta.get("edits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verfy": True}, "Unknown option 'verfy'. Did you mean 'verify'"),
        ({"selection": "fast"}, "Option selection='fast'"),
        ({"passes": ["sparse_liner"]}, "Unknown pass 'sparse_liner'. Did you mean 'sparse_linear'"),
    ],
)
def test_bad_options_are_errors(options, message):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(make(), backend="sparse", options=options)(torch.randn(ROWS, IN))


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        (torch.float64, "the weight is float64"),
        (torch.float16, "the weight is float16"),
        (torch.complex64, "the weight is complex"),
    ],
)
def test_other_dtypes_run_dense_and_say_so(records, dtype, sentence):
    model, x = make(dtype=dtype), torch.randn(ROWS, IN).to(dtype)
    function = compiled(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's about complex numbers
        torch.testing.assert_close(function(x), model(x))
    reasons = [rewrite.reason for rewrite in records[0].rewrites if rewrite.kind == "linear"]
    assert [reason.startswith(sentence) for reason in reasons] == [True]


INPUTS = {
    "empty": lambda: torch.randn(0, IN),
    "one row": lambda: torch.randn(1, IN),
    "vector": lambda: torch.randn(IN),
    "transposed": lambda: torch.randn(IN, ROWS).t(),
    "every other column": lambda: torch.randn(ROWS, 2 * IN)[:, ::2],
    "padded rows": lambda: torch.randn(ROWS, IN + 5)[:, 3 : IN + 3],
    "expanded rows": lambda: torch.randn(1, IN).expand(ROWS, IN),
    "expanded columns": lambda: torch.randn(ROWS, 1).expand(ROWS, IN),
    "three dimensions": lambda: torch.randn(2, 3, IN).transpose(0, 1),
    "nan and infinities": lambda: torch.randn(ROWS, IN).index_fill(
        1, torch.tensor([3]), float("inf")
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(records, name):
    model, x = make(), INPUTS[name]()
    function = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x), equal_nan=True)
    assert any(rewrite.applied for rewrite in records[0].rewrites)


def test_gradients_for_the_input_of_frozen_weights(records):
    model = make().requires_grad_(False)
    function = compiled(model)
    x, again = (torch.ones(ROWS, IN).requires_grad_() for _ in range(2))
    function(x).square().sum().backward()
    model(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, atol=1e-4, rtol=1e-4)
    assert any(rewrite.applied for rewrite in records[0].rewrites)


def test_a_failing_pass_leaves_the_layer_dense_with_one_warning(records, monkeypatch):
    def pack(*args, **kwargs):
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(csr, "pack", pack)
    model, x = make(), torch.randn(ROWS, IN)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(model, on_error="fallback")(x), model(x))
    ours = [str(w.message) for w in caught if "sparse_compiler" in str(w.message)]
    assert len(ours) == 1 and "left 0 dense after an internal error" in ours[0]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="0: ZeroDivisionError: no room"), torch.no_grad():
        compiled(model)(x)


def test_a_failure_outside_the_passes_leaves_the_graph_dense(records, monkeypatch):
    def canonicalize(*args):
        raise RuntimeError("lost")

    monkeypatch.setattr("sparse_compiler.backend.canonicalize_dynamo", canonicalize)
    model, x = make(), torch.randn(ROWS, IN)
    with pytest.warns(UserWarning, match="left the whole graph dense"), torch.no_grad():
        torch.testing.assert_close(compiled(model, on_error="fallback")(x), model(x))


def test_old_kernels_in_inductors_cache_are_not_used(monkeypatch, tmp_path, records):
    """The kernels' digest is part of the graph, and so of Inductor's cache keys."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = make(0.1, bias=False), torch.randn(ROWS, IN)
    headers = cpp.headers

    def broken(name: str) -> str:
        text = headers(name)
        assert "return fma<L>(a, b, acc);" in text
        return text.replace("return fma<L>(a, b, acc);", "return acc;")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(cpp, "headers", broken)
            patch.setattr(cpp, "digest", lambda: "an older one")
            assert not compiled(model)(x).any(), "the older kernel was to give zeros"
            torch._dynamo.reset()
            # Warm: with the same digest the code comes from the cache.
            patch.setattr(cpp, "headers", headers)
            assert not compiled(model)(x).any(), "Inductor's cache was to be warm"
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_values_of_weights_are_not_in_inductors_cache(records):
    """Two models whose weights have one layout share code, and nothing else."""
    x = torch.randn(ROWS, IN)
    first, second = make(0.1), make(0.1)
    with torch.no_grad():
        second[0].weight.mul_(-3)
        for model in (first, second):
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(model)(x), model(x))


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    torch._dynamo.reset()
    model, x = make(), torch.randn(ROWS, IN)
    function = torch.compile(model, backend="sparse", options=ALWAYS) if mode is None else None
    if function is None:
        # torch.compile takes a mode or options.
        function = torch.compile(model, backend="sparse", mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))


def test_graph_breaks_and_several_graphs(records):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

        def forward(self, x):
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y)

    model, x = prune_layers(Broken()), torch.randn(ROWS, IN)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), atol=1e-5, rtol=1e-4)
    names = [r.target for record in records for r in record.rewrites if r.applied]
    assert names == ["a", "b"]


def test_autocast_gives_the_dtype_and_values_of_eager(records):
    model = prune_layers(nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN)))
    x = torch.randn(ROWS, IN)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    with torch.no_grad():
        expected = inside(x)
        for function in (compiled(inside), compiled(model)):
            torch._dynamo.reset()
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x)
            assert y.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    for record in records:
        linear = [rewrite for rewrite in record.rewrites if rewrite.kind == "linear"]
        assert [(r.applied, r.dtype) for r in linear] == [(True, "bfloat16")] * 2


def test_autocast_inside_other_operators_is_left_alone(records):
    """einsum converts its operands within: what it does is known, but not spelled out."""

    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(pruned(OUT, IN, 0.2))

        def forward(self, x):
            return torch.einsum("bk,nk->bn", x, self.weight)

    model, x = Einsum(), torch.randn(ROWS, IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(model)(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, model(x), atol=0.05, rtol=0.05)
    (rewrite,) = (r for r in records[0].rewrites if r.kind == "linear")
    assert rewrite.reason == (
        "aten.einsum.default converts its operands: float32 times float32 is bfloat16"
    )


def test_listeners_and_rewrites_agree_with_the_graph(records):
    model, x = make(), torch.randn(ROWS, IN)
    with torch.no_grad():
        compiled(model)(x)
    (record,) = records
    assert record.seconds > 0
    (edit,) = record.after.meta["edits"]
    assert edit.rule == "sparse_linear: csr"
    before = [str(n.target) for n in record.before.graph.nodes if n.op == "call_function"]
    assert before == ["aten.linear.default"]


def test_explain_leaves_the_listeners_as_they_were(records):
    model = make()
    with torch.no_grad():
        report = sc.explain(model, torch.randn(ROWS, IN), options=ALWAYS)
    assert [r.applied for r in report.rewrites if r.kind == "linear"] == [True]


def test_other_versions_of_torch_are_refused(monkeypatch):
    model = torch.nn.Linear(4, 4)
    for version in ("2.10.1", "2.14.0a0", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(sc.UnsupportedError, match=r"install torch>=2\.11,<2\.14"):
            backend.sparse(torch.fx.symbolic_trace(model), [torch.ones(1, 4)])
