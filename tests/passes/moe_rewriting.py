"""What tests of the pass over mixtures of experts share: running it, and comparing."""

import torch

import sparse_compiler as sc
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import Moe, PassContext, moe


def allow_float64(monkeypatch):
    """Let the pass rewrite float64, which the operator's reference body computes."""
    monkeypatch.setattr(moe, "_DTYPES", (torch.float64, torch.float32, torch.bfloat16))


def rewrite(model, *inputs, training=False, **options):
    """The model's graph after the pass, and the verdicts."""
    gm = sc.canonicalize(model, *inputs)
    context = PassContext(
        Options.parse({"on_error": "raise", **options}), training, AlwaysSelector()
    )
    Moe(context)(gm)
    return gm, context.rewrites


def calls(gm):
    """The operators ``moe`` and ``moe_training`` in a graph."""
    return [node for node in gm.graph.nodes if "sparse_compiler.moe" in str(node.target)]


def assert_rewritten(model, *inputs, spelling=None, training=False, bound=1e-9):
    """One rewrite, with the values and gradients of the original; returns the call and verdict."""
    gm, rewrites = rewrite(model, *inputs, training=training)
    assert [item.applied for item in rewrites] == [True], [item.reason for item in rewrites]
    (call,) = calls(gm)
    assert spelling is None or rewrites[0].spelling == spelling
    assert_same(model, gm, *inputs, bound=bound)
    return call, rewrites[0]


def assert_same(model, gm, *inputs, bound=1e-9):
    """Results, and gradients of inputs and parameters, agree."""
    found = []
    for function in (model, gm):
        leaves = [value.detach().clone() for value in inputs]
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        result = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        wanted += list(model.parameters())
        weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype)
        total = (result * weights.view_as(result)).sum()
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        found.append([result, *grads])
    for want, got in zip(*found, strict=True):
        assert want.shape == got.shape and want.dtype == got.dtype
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got, want, rtol=0, atol=bound * scale)
    assert found[0][0].numel() == 0 or bool(found[0][0].any())


def refusal(model, *inputs, training=False):
    """The one sentence that leaves a model alone; its graph has to be as it was."""
    gm, rewrites = rewrite(model, *inputs, training=training)
    assert not calls(gm) and not gm.meta.get("edits")
    assert rewrites and not any(item.applied for item in rewrites)
    assert len(rewrites) == 1, [item.reason for item in rewrites]
    return rewrites[0].reason
