"""The registry, on a toy: find, check, swap; and what prepare() promises in any case."""

import pytest
import torch
from torch import nn

from sparse_compiler.errors import OptionError
from sparse_compiler.prepare import Case, Preparer, prepare, register
from sparse_compiler.prepare import compile as sc_compile
from sparse_compiler.prepare.registry import PREPARERS


class Loop(nn.Module):
    """Multiplies the rows that are positive in sum, one by one."""

    def __init__(self):
        super().__init__()
        self.loop_layer = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        for row in (x.sum(-1) > 0).nonzero().flatten().tolist():
            y[row] = self.loop_layer(x[row])
        return y


def masked(module, x):
    return torch.where((x.sum(-1, keepdim=True) > 0), module.loop_layer(x), 0.0)


class Loops(Preparer):
    name = "loop over rows"

    def __init__(self, forward=masked):
        self.replacement = forward

    def find(self, module):
        return hasattr(module, "loop_layer")

    def refuse(self, module, calls):
        if calls is not None and module not in calls:
            return "the example never reaches it"
        return None

    def cases(self, module, calls, thorough):
        self.calls, self.asked = calls, [*getattr(self, "asked", []), thorough]
        yield Case("five rows", (torch.randn(5, 4),))

    def forward(self):
        return self.replacement


@pytest.fixture
def registry():
    """Preparers that are registered here are gone afterwards."""
    before = list(PREPARERS)
    yield
    PREPARERS[:] = before


@pytest.fixture
def model():
    return nn.Sequential(Loop(), nn.ReLU(), Loop(), nn.Dropout(0.5))


def graphs(model, x):
    torch._dynamo.reset()
    found = []
    y = torch.compile(model, backend=lambda gm, _: found.append(gm) or gm)(x)
    return len(found), y


def test_find_check_swap(registry, model):
    preparer = register(Loops())
    x = torch.randn(6, 4)
    model.eval()
    expected = model(x)
    assert graphs(model, x)[0] > 1
    prepared = prepare(model, x)
    assert [item.path for item in prepared.swapped] == ["0", "2"]
    assert prepared.swapped[0].kind == "loop over rows"
    assert prepared.swapped[0].checked == ("five rows",)
    # Layers that run the same code are checked thoroughly once.
    assert preparer.asked == [True, False]
    count, y = graphs(model, x)
    assert count == 1
    torch.testing.assert_close(y, expected)
    # The example's tensors are seen by shape alone.
    (call,) = preparer.calls[model[0]]
    assert call["x"].shape == x.shape and call["x"].is_meta
    prepared.undo()
    assert graphs(model, x)[0] > 1


def test_prepare_leaves_no_trace(registry, model):
    register(Loops())
    model.train()
    model[3].eval()
    x = torch.randn(6, 4, requires_grad=True)
    random = torch.get_rng_state()
    with torch.no_grad():
        prepare(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, True, False]
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_under_inference_mode(registry, model):
    register(Loops())
    with torch.inference_mode():
        assert len(prepare(model, torch.randn(6, 4)).swapped) == 2


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda module, x: masked(module, x) * 1.01, "output 0 differs"),
        (lambda module, x: masked(module, x).detach(), "gradient of argument 0 differs"),
        (lambda module, x: masked(module, x.detach()), "gradient of argument 0 differs"),
        (lambda module, x: masked(module, x)[:2], r"output 0 has shape \[2, 4\], not \[5, 4\]"),
        (lambda module, x: masked(module, x) * float("nan"), "differs from the original's by nan"),
        (lambda module, x: None, "it returns"),
        (lambda module, x: 1 / 0, "could not be checked: ZeroDivisionError: division by zero"),
    ],
)
def test_a_replacement_that_differs_is_refused(registry, model, forward, reason):
    register(Loops(forward))
    prepared = prepare(model, torch.randn(6, 4))
    assert not prepared.swapped and len(prepared.refused) == 2
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(prepared.refused[0].reason)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_preparer_that_fails_leaves_the_model_whole(registry, model):
    register(Loops())

    class Failing(Loops):
        name = "failing"

        def refuse(self, module, calls):
            raise KeyError("a bug")

    # The first has swapped two modules when the second fails.
    register(Failing())
    PREPARERS[-1].find = lambda module: isinstance(module, nn.ReLU)
    with pytest.raises(KeyError, match="a bug"):
        prepare(model, torch.randn(6, 4))
    assert not any("forward" in vars(module) for module in model.modules())


def test_modules_the_example_does_not_reach(registry, model):
    register(Loops())
    model.spare = Loop()
    model.forward = lambda x: model[0](x)
    prepared = prepare(model, torch.randn(6, 4))
    assert [item.path for item in prepared.swapped] == ["0"]
    assert [item.path for item in prepared.refused] == ["2", "spare"]


def test_nothing_to_prepare():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("there is no reason to run the model")

    prepared = prepare(Never(), torch.randn(2))
    assert not prepared.swapped and not prepared.refused
    assert str(prepared).startswith("nothing to prepare")


def test_caches_in_the_example_are_not_filled(registry, model):
    register(Loops())

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, cache):
            cache["last"] = x
            x.mul_(2)
            return self.inner(x)

    cache, x = {}, torch.ones(6, 4)
    prepare(Cached(), x, cache=cache)
    assert not cache and torch.equal(x, torch.ones(6, 4))


def test_register_checks(registry):
    with pytest.raises(TypeError, match="takes an object like"):
        register(Loops)
    register(Loops())
    with pytest.raises(ValueError, match="taken"):
        register(Loops())


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not function"):
        prepare(lambda x: x)
    with pytest.raises(TypeError, match=r"compiled already: write prepare\(model"):
        prepare(torch.compile(nn.Linear(2, 2)))
    with pytest.raises(OptionError, match="always uses backend"):
        sc_compile(nn.Linear(2, 2), backend="inductor")


def test_compile(registry, model, caplog):
    register(Loops())
    model.eval()
    model.add_module("spare", Loop())
    x = torch.randn(6, 4)
    expected = model(x)
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    expected = model(x)
    with caplog.at_level("WARNING", logger="sparse_compiler"):
        fast = sc_compile(model, example_kwargs={"x": x}, fullgraph=True)
    assert "loop over rows at spare: the example never reaches it" in caplog.text
    torch.testing.assert_close(fast(x), expected)
