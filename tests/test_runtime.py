"""A compiled model notices that its weights changed: nothing stale is ever multiplied."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from helpers import compiled, listening, prune_layers, pruned
from torch import nn
from torch.nn.utils import prune

import sparse_compiler as sc
from sparse_compiler.runtime import _SETTLED_CALLS, live

# One shape for all tests: Inductor compiles its kernel once.
OUT, IN, ROWS = 64, 32, 4
LINEAR = {"passes": ["sparse_linear", "fold_static"]}


def make(density: float = 0.2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(pruned(OUT, IN, density, dtype))
    return model


class Compiled:
    """A model, its compiled form after one call, and what was compiled so far."""

    def __init__(self, model: nn.Module, records: list, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.records = model, records
        self.x = torch.randn(ROWS, IN, dtype=dtype)
        self.compiled = compiled(model, **LINEAR)
        self.check()
        assert any(rewrite.applied for rewrite in self.records[0].rewrites)

    def check(self) -> None:
        """The compiled model and the model agree, to the bound of another order of additions."""
        with torch.no_grad():
            x = self.x.to(next(self.model.parameters()).dtype)
            torch.testing.assert_close(self.compiled(x), self.model(x), atol=1e-5, rtol=1e-4)

    @property
    def call(self):
        return self.records[0].call


@pytest.fixture
def records():
    torch._dynamo.reset()
    with listening() as found:
        yield found


@pytest.fixture
def run(records):
    return Compiled(make(), records)


def scale(weight):
    weight.mul_(3)


def move(weight):
    """Other places, as many weights in each row: it fits."""
    weight.copy_(weight.roll(1, dims=1))


def remove(weight):
    weight[weight.abs() < 0.5] = 0


@pytest.mark.parametrize("change", [scale, move, remove])
def test_a_change_that_fits_is_packed_again(run, change):
    with torch.no_grad():
        change(run.model[0].weight)
    run.check()
    assert run.call.stale_calls == 0 and len(run.records) == 1


def test_load_state_dict(run):
    run.model.load_state_dict({k: v * 2 for k, v in run.model.state_dict().items()})
    run.check()
    assert run.call.stale_calls == 0


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_load_state_dict_with_assign(run, density):
    run.model.load_state_dict(make(density).state_dict(), assign=True)
    run.check()


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_reassignment(run, density):
    run.model[0].weight = nn.Parameter(make(density)[0].weight.detach().clone())
    run.check()
    run.model[0] = make(0.15)[0]
    run.check()


def test_an_optimizer_step(run):
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        run.model(run.x).square().sum().backward()
        optimizer.step()
        run.check()
    assert run.call.stale_calls >= 1  # a dense gradient leaves no zeros


@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimizer_that_writes_in_place(run, foreach):
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.1, foreach=foreach)
    run.model(run.x).square().sum().backward()
    run.model[0].weight.grad[run.model[0].weight == 0] = 0
    optimizer.step()
    run.check()
    assert run.call.stale_calls == 0  # the zeros stayed


def test_another_dtype_and_back(run):
    run.model.to(torch.bfloat16)
    x = run.x.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(run.compiled(x), run.model(x), atol=0.05, rtol=0.02)
    run.model.to(torch.float32)
    run.check()


def test_requires_grad_toggles(run):
    run.model.requires_grad_(False)
    run.check()
    with torch.no_grad():
        run.model[0].weight.mul_(2)
    run.check()
    run.model.requires_grad_(True)
    run.check()


def test_pruning_after_compiling(records):
    model = make(1.0)
    function = compiled(model, **LINEAR)
    x = torch.randn(ROWS, IN)
    with torch.no_grad():
        for density in (1.0, 0.3, 0.1):
            prune_layers(model, density)
            torch.testing.assert_close(function(x), model(x))
    assert not any(rewrite.applied for rewrite in records[0].rewrites)
    assert records[0].rewrites[0].reason == "the weight has no zeros"


def test_torch_prune_after_compiling(run):
    prune.l1_unstructured(run.model[0], "weight", 0.9)
    run.check()
    prune.remove(run.model[0], "weight")
    run.check()


def test_what_no_longer_fits_runs_dense_at_once_and_is_compiled_anew(run):
    with torch.no_grad():
        run.model[0].weight.copy_(pruned(OUT, IN, 0.4, seed=7))
    for calls in range(1, _SETTLED_CALLS + 2):
        run.check()
        assert run.call.stale_calls == calls
    run.check()
    assert len(run.records) == 2 and run.records[1].rewrites[0].applied
    with torch.no_grad():
        run.model[0].weight.mul_(2)
    run.check()
    assert run.call.stale_calls == _SETTLED_CALLS + 1


def test_weights_that_keep_changing_are_not_compiled_again_and_again(run):
    for seed in range(8):
        with torch.no_grad():
            run.model[0].weight.copy_(pruned(OUT, IN, 0.5, seed=seed))
        run.check()
    assert len(run.records) == 1


def test_assigning_data_is_seen(run):
    """``module.to`` and ``prune.remove`` do this; it changes the memory and no version."""
    weight = run.model[0].weight
    for density in (0.15, 0.1, 1.0):
        version = weight._version
        weight.data = pruned(OUT, IN, density, seed=5)
        assert weight._version == version
        run.check()


def test_a_replaced_weight_is_not_kept_alive(run):
    weight = weakref.ref(run.model[0].weight)
    memory = run.call._states[0].sources[0]._held
    assert weight() is not None and len(memory) == 1
    run.model[0].weight = nn.Parameter(torch.randn(OUT, IN))
    gc.collect()
    assert weight() is None and memory == []


def test_a_weight_that_changes_while_compiling(records, monkeypatch):
    from sparse_compiler.codegen import inductor

    model, compile_graph = make(), inductor.compile_graph

    def slow(*arguments):
        with torch.no_grad():  # what another thread may do meanwhile
            model[0].weight.mul_(2)
        return compile_graph(*arguments)

    monkeypatch.setattr(inductor, "compile_graph", slow)
    Compiled(model, records)


def test_weights_that_are_views(records):
    class Fused(nn.Module):
        """Two layers in one parameter, cut apart in forward."""

        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(pruned(2 * OUT, IN, 0.2))

        def forward(self, x):
            first, second = self.both.split(OUT)
            return torch.nn.functional.linear(x, first), x @ second.t()

    run = Compiled(Fused(), records)
    assert [r.applied for r in records[0].rewrites if r.kind == "linear"] == [True, True]
    with torch.no_grad():
        run.model.both[OUT + 3].mul_(2)
    run.check()
    base = pruned(OUT + 7, IN, 0.2)
    other = make()
    other[0].weight = nn.Parameter(base[3 : OUT + 3])
    run = Compiled(other, records)
    with torch.no_grad():
        base.mul_(2)
    assert run.model[0].weight._version == base._version
    run.check()


def test_tied_weights(records):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(IN, IN, bias=False), nn.Linear(IN, IN, bias=False)
            self.a.weight = nn.Parameter(pruned(IN, IN, 0.2))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    run = Compiled(Tied(), records)
    with torch.no_grad():
        run.model.b.weight.mul_(2)
    run.check()
    run.model.b.weight = nn.Parameter(pruned(IN, IN, 0.2, seed=4))
    run.check()


def test_data_edits_need_refresh(run):
    run.model[0].weight.data.mul_(2)
    assert sc.refresh(run.compiled) == 1
    run.check()
    assert run.call.stale_calls == 0
    run.model[0].weight.data = pruned(OUT, IN, 0.6)
    assert sc.refresh(run.model) == 1
    run.check()


def test_refresh_leaves_other_models_alone(run):
    other = nn.Linear(3, 3)
    assert sc.refresh(other) == 0


def test_inference_mode(run):
    with torch.inference_mode():
        y = run.compiled(run.x)
        torch.testing.assert_close(y, run.model(run.x))
    with torch.no_grad():
        run.model[0].weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(run.compiled(run.x), run.model(run.x))
    run.check()


def test_compiled_in_inference_mode(records):
    model, x = make(), torch.randn(ROWS, IN)
    prune.l1_unstructured(model[0], "weight", 0.5)
    function = compiled(model, **LINEAR)
    with torch.inference_mode():
        torch.testing.assert_close(function(x), model(x))
    assert records[0].rewrites[0].applied
    with torch.no_grad():
        model[0].weight_orig.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(function(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(function(x), model(x))


def test_a_model_made_in_inference_mode_is_refused_with_the_sentence(records):
    with torch.inference_mode():
        model, x = make(), torch.randn(ROWS, IN)
        function = compiled(model, **LINEAR)
        torch.testing.assert_close(function(x), model(x))
        model[0].weight.mul_(2)
        torch.testing.assert_close(function(x), model(x))
    (rewrite,) = records[0].rewrites
    assert rewrite.reason.startswith("the weight is an inference tensor, whose changes cannot")


def test_two_models_of_one_shape(records):
    first, second = Compiled(make(), records), make()
    with torch.no_grad():
        second[0].weight.copy_(first.model[0].weight.flip(1))
    other = Compiled(second, records)
    first.check()
    other.check()


def test_deepcopy(run):
    twin = copy.deepcopy(run.compiled)
    original = run.model[0].weight.detach().clone()
    with torch.no_grad():
        twin._orig_mod[0].weight.mul_(-1)
        twin._orig_mod[0].bias.zero_()
        torch.testing.assert_close(twin(run.x), run.x @ -original.t(), atol=1e-5, rtol=1e-4)
    run.check()


def test_eight_threads_while_the_weight_changes(run):
    """Every result belongs to one of the weights there were, never to a mixture of them."""
    weight, x = run.model[0].weight, run.x
    steps = [1.0, 2.0, 4.0, 8.0]
    with torch.no_grad():
        run.model[0].bias.zero_()
        base = run.model(x)
    wanted = [base * step for step in steps]
    failures: list[str] = []
    stop = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                y = run.compiled(x)
                if not any(torch.allclose(y, w, atol=1e-4, rtol=1e-4) for w in wanted):
                    failures.append(f"{y.flatten()[:3]}")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in steps[1:]:
            stop.wait(0.2)
            # A whole new tensor: in-place arithmetic would be seen half done even by eager.
            run.model[0].weight = nn.Parameter(run.model[0].weight * 2)
    stop.wait(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert weight is not run.model[0].weight
    run.check()


def test_a_mask_update_of_equal_density_does_not_compile_again(records):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(OUT, IN))
            self.register_buffer("mask", pruned(OUT, IN, 0.2) != 0)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight * self.mask)

    model, x = Masked(), torch.randn(ROWS, IN)
    function = compiled(model, **LINEAR)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        y = function(x)
        torch.testing.assert_close(y, model(x), atol=1e-5, rtol=1e-4)
        optimizer.zero_grad()
        y.square().sum().backward()
        found = model.weight.grad.clone()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(found, model.weight.grad, atol=1e-3, rtol=1e-4)
        optimizer.step()
        with torch.no_grad():
            model.mask.copy_(model.mask.flatten()[torch.randperm(OUT * IN)].view(OUT, IN))
    assert len(records) == 1 and records[0].call.stale_calls == 0
    assert records[0].rewrites[0].applied
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_a_folded_result_that_is_written_to_is_made_anew(records):
    """torch.nn.utils.prune leaves the masked weight on the module, where others may find it."""
    model = make()
    prune.random_unstructured(model[0], "weight", 0.5)
    run = Compiled(model, records)
    with torch.no_grad():
        run.compiled(run.x)
        model[0].weight.zero_()  # what the compiled forward left there
    run.check()


def test_two_models_of_one_shape_take_turns_without_packing_again(monkeypatch) -> None:
    """Dynamo runs both through the code of the first; each keeps its own packed weights."""
    models = [make().eval() for _ in "ab"]
    models[1][0].weight.data.copy_(models[0][0].weight * 2)
    x = torch.randn(ROWS, IN)
    with torch.no_grad():
        calls = [compiled(model, **LINEAR) for model in models]
        for call, model in zip(calls, models, strict=True):
            torch.testing.assert_close(call(x), model(x))
        (guarded,) = [g for g in live if g.uses({id(models[1][0].weight)})]
        assert guarded.uses({id(models[0][0].weight)})

        def packs_again(args: object) -> None:
            raise AssertionError("packed again")

        monkeypatch.setattr(guarded, "_stale", packs_again)
        for call, model in zip(calls * 2, models * 2, strict=True):
            torch.testing.assert_close(call(x), model(x))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_optimizers_are_noticed(fused):
    """Fused ones do not change versions by themselves."""
    torch._dynamo.reset()
    model = nn.Linear(16, 16)
    torch.nn.utils.prune.random_unstructured(model, "weight", 0.8)
    function, x = compiled(model), torch.randn(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(function(x), model(x))
        model(x).square().sum().backward()
        optimizer.step()
