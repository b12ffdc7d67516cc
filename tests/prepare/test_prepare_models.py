"""Longformer, LED, BigBird, BigBird-Pegasus: one graph, same outputs, same gradients."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

pytest.importorskip("transformers", minversion="5.0")
from hand_sparse import MODELS, bigbird, compiled, longformer, run, tensors, unchanged

from sparse_compiler.prepare import prepare
from sparse_compiler.prepare.swap import always_replaced

# What the originals are: enough to notice if transformers repairs them.
BREAKS = {"longformer": 17, "led": 17, "bigbird": 10, "pegasus": 12}
# Layers have one attention, Longformer's layers have two; plus the decoders' own.
LAYERS = 2


def attentions(model):
    """The modules with hand-written sparse attention."""
    return [m for m in model.modules() if hasattr(m, "query") and not hasattr(m, "self")]


def assert_close(actual, expected, rtol):
    assert len(actual) == len(expected)
    largest = max(float(tensor.abs().max()) for tensor in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        # Some gradients are zero up to rounding.
        atol = rtol * max(float(theirs.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_where_the_original_has_many(name):
    model, inputs = MODELS[name](layers=1)
    model.eval()
    if "global_attention_mask" in inputs:
        # With several global tokens in a sequence Dynamo fails inside, in the original.
        inputs["global_attention_mask"][:, 1:] = 0
    original, before = compiled(model)
    expected = run(original, inputs, gradients=False)
    assert len(before.graphs) >= BREAKS[name] - 3
    prepared = prepare(model, **inputs)
    assert not prepared.refused, prepared
    replaced, after = compiled(model, fullgraph=True)
    assert_close(run(replaced, inputs, gradients=False), expected, 1e-5)
    assert len(after.graphs) == 1
    # Both of Longformer's attentions, BigBird's only one; the rest are the decoders'.
    assert after.attentions() >= (2 if name in ("longformer", "led") else 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, True), (torch.float64, False)])
def test_same_outputs_and_gradients(name, dtype, training):
    model, inputs = MODELS[name]()
    model.to(dtype).train(training)
    if dtype == torch.float64 and "global_attention_mask" in inputs:
        # Padding, and different numbers of global tokens, have NaN gradients in the original.
        inputs["attention_mask"][:] = 1
        inputs["global_attention_mask"][:] = inputs["global_attention_mask"][0]
    expected = run(model, inputs)
    assert all(tensor.isfinite().all() for tensor in expected)
    with unchanged(model):
        prepared = prepare(model, **inputs)
    assert not prepared.refused, prepared
    replaced, backend = compiled(model)
    actual = run(replaced, inputs)
    # Longformer's own softmax is in float32 also in float64.
    assert_close(actual, expected, 2e-5 if dtype == torch.float32 else 2e-6)
    assert len(backend.graphs) == 1
    assert all(tensor.dtype == dtype for tensor in actual)


def test_a_length_that_the_model_pads():
    # The message about padding cuts the graph in front of the layers, not in them.
    model, inputs = longformer()
    model.eval()
    cut = {key: value[:, :27] for key, value in inputs.items()}
    expected = run(model, cut)
    prepare(model, **cut)
    replaced, backend = compiled(model)
    assert_close(run(replaced, cut), expected, 2e-5)
    assert len([g for g in backend.graphs if "scaled_dot_product" in g.code]) == 1


@pytest.mark.parametrize("name", MODELS)
def test_eager_calls_run_the_original(name):
    model, inputs = MODELS[name](layers=1)
    model.eval()
    expected = run(model, inputs)
    prepare(model, **inputs)
    for ours, theirs in zip(run(model, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_undo(name):
    model, inputs = MODELS[name](layers=1)
    before = [set(vars(module)) for module in model.modules()]
    prepared = prepare(model, **inputs)
    assert any("forward" in vars(module) for module in model.modules())
    assert prepared.undo() is model
    assert [set(vars(module)) for module in model.modules()] == before
    assert prepared.undo() is model
    again = prepare(model, **inputs)
    assert again.swapped == prepared.swapped and not again.refused


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_checkpoints_copies_and_pickles(name):
    model, inputs = MODELS[name](layers=1)
    model.eval()
    other, _ = MODELS[name](layers=1)
    other.eval()
    prepare(model, **inputs)
    assert list(model.state_dict()) == list(other.state_dict())
    model.load_state_dict(other.state_dict())
    expected = run(other, inputs, gradients=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        parts = attentions(copied)
        # The replacement belongs to the copy.
        assert any("forward" in vars(part) for part in parts)
        assert all(part.forward.args[0] is part for part in parts if "forward" in vars(part))
        replaced, backend = compiled(copied)
        assert_close(run(replaced, inputs, gradients=False), expected, 1e-5)
        assert len(backend.graphs) == 1


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_attention_probabilities_are_the_originals(name):
    model, inputs = MODELS[name](layers=1)
    model.eval()
    inputs["output_attentions"] = True
    expected = tensors(model(**inputs))
    prepared = prepare(model, **inputs)
    assert not prepared.swapped
    assert any("output_attentions" in refused.reason for refused in prepared.refused)
    # Prepared without, called with: the original runs.
    del inputs["output_attentions"]
    prepared = prepare(model, **inputs)
    assert not prepared.refused
    for how in (model, torch.compile(model, backend="eager")):
        actual = tensors(how(**inputs, output_attentions=True))
        assert_close(actual, expected, 1e-5)


def test_dropout_has_the_same_distribution():
    model, inputs = longformer(layers=1)
    prepare(model, **inputs)
    part = next(m for m in model.modules() if hasattr(m, "one_sided_attn_window_size"))
    part.dropout = 0.4
    n = 16
    hidden = torch.randn(1, n, 32).expand(600, n, 32)
    mask = torch.zeros(600, n)
    mask[:, 12:], mask[:, 3] = -1e9, 1e9
    args = (hidden, mask, mask < 0, mask > 0, True)
    part.train()
    with torch.no_grad():
        theirs = part(*args)[0]
        with always_replaced():
            ours = part(*args)[0]
            again = part(*args)[0]
            exact = part.eval()(*args)[0]
    assert not torch.equal(ours, again)
    # 600 samples: means agree to about five standard errors, spreads to a tenth.
    error = 5 * theirs.std(0) / 600**0.5 + 1e-6
    assert ((ours.mean(0) - exact[0]).abs() < error).all()
    assert ((theirs.mean(0) - exact[0]).abs() < error).all()
    real = theirs.std(0) > 1e-3
    assert torch.equal(real, ours.std(0) > 1e-3)
    ratio = ours.std(0)[real] / theirs.std(0)[real]
    assert abs(float(ratio.mean()) - 1) < 0.02


def test_batches_with_and_without_global_tokens():
    model, inputs = longformer(layers=1)
    model.eval()
    without = {**inputs, "global_attention_mask": torch.zeros_like(inputs["input_ids"])}
    padded = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
    padded["attention_mask"][0, :9] = 1
    padded["global_attention_mask"] = padded["attention_mask"].clone()
    cases = [inputs, without, padded]
    expected = [run(model, case) for case in cases]

    prepare(model, **inputs)
    replaced, backend = compiled(model)
    for case, theirs in zip(cases, expected, strict=True):
        assert_close(run(replaced, case), theirs, 2e-5)
    # What is global is data: nothing is compiled again.
    assert len(backend.graphs) == 1


def test_an_example_without_global_tokens_keeps_the_question():
    model, inputs = longformer(layers=1)
    model.eval()
    without = {**inputs, "global_attention_mask": None}
    expected = [run(model, case) for case in (without, inputs)]
    prepared = prepare(model, **without)
    assert [item.kind for item in prepared.swapped] == ["Longformer attention"]
    assert [item.kind for item in prepared.refused] == ["Longformer encoder"]
    assert "no global tokens" in prepared.refused[0].reason
    replaced, backend = compiled(model)
    assert_close(run(replaced, without), expected[0], 2e-5)
    # Each graph knows the answer; without global tokens their projections are not in it.
    assert not any("query_global" in graph.code for graph in backend.graphs)
    assert_close(run(replaced, inputs), expected[1], 2e-5)
    assert any("query_global" in graph.code for graph in backend.graphs)


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_without_an_example(name):
    model, inputs = MODELS[name](layers=1)
    with unchanged(model):
        prepared = prepare(model)
    assert prepared.swapped and not prepared.refused, prepared
    replaced, backend = compiled(model.eval())
    assert_close(run(replaced, inputs), run(model, inputs), 2e-5)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("make", [longformer, bigbird])
def test_gradient_checkpointing(make):
    model, inputs = make()
    model.train()
    expected = run(model, inputs)
    model.gradient_checkpointing_enable()
    prepare(model, **inputs)
    replaced, _ = compiled(model)
    assert_close(run(replaced, inputs), expected, 2e-5)


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_bfloat16(name):
    model, inputs = MODELS[name](layers=1)
    model.eval()
    expected = run(model, inputs, gradients=False)
    model.bfloat16()
    prepared = prepare(model, **inputs)
    assert not prepared.refused, prepared
    replaced, _ = compiled(model)
    outputs = run(replaced, inputs, gradients=False)
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert_close([output.float() for output in outputs], expected, 0.05)


def test_lengths_may_be_dynamic():
    model, inputs = longformer(layers=1)
    model.eval()
    prepare(model, **inputs)
    replaced, _ = compiled(model, dynamic=True)
    for n in (32, 20, 8):
        cut = {key: x[:, :n] if key in _SEQUENCES else x for key, x in inputs.items()}
        assert_close(run(replaced, cut), run(model, cut), 2e-5)


_SEQUENCES = ("input_ids", "attention_mask", "global_attention_mask")


def test_pruned_layers():
    model, inputs = longformer(layers=1)
    model.eval()
    part = attentions(model)[0]
    for layer in (part.query, part.value_global):
        prune.random_unstructured(layer, "weight", amount=0.5)
    weight = part.query.weight
    expected = run(model, inputs)
    weight = part.query.weight
    prepared = prepare(model, **inputs)
    assert not prepared.refused, prepared
    assert part.query.weight is weight
    replaced, backend = compiled(model)
    assert_close(run(replaced, inputs), expected, 2e-5)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("n", [40, 124])
def test_bigbird_lengths_and_modes(n):
    model, inputs = bigbird(layers=1)
    prepare(model, **inputs)
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(3, 50, (2, n), generator=generator)
    for training in (False, True):
        model.train(training)
        expected = run(model, {"input_ids": ids})
        replaced, backend = compiled(model)
        assert_close(run(replaced, {"input_ids": ids}), expected, 2e-5)
        assert len(backend.graphs) == 1


def test_bigbird_at_a_length_with_a_long_plan():
    # 1024 tokens draw their plan in another way, from that of the longest sequence.
    import transformers

    config = transformers.BigBirdConfig(
        block_size=64,
        num_random_blocks=3,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=50,
        max_position_embeddings=2048,
        hidden_dropout_prob=0.0,
    )
    model = transformers.BigBirdModel(config).train()
    ids = torch.randint(3, 50, (1, 1024))
    expected = run(model, {"input_ids": ids})
    prepared = prepare(model, input_ids=ids)
    assert prepared.swapped[0].checked[-1] == "1024 tokens in training mode"
    replaced, _ = compiled(model)
    assert_close(run(replaced, {"input_ids": ids}), expected, 2e-5)


def test_bigbird_leaves_numpys_random_numbers_alone():
    model, inputs = bigbird(layers=1)
    model.train()
    prepare(model, **inputs)
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    compiled(model)[0](**inputs)
    assert np.random.rand() == expected


def test_bigbird_that_switches_to_full_attention():
    model, inputs = bigbird(layers=1)
    model.eval()
    short = {key: value[:, :20] for key, value in inputs.items()}
    with unchanged(model):
        prepared = prepare(model, **short)
    # Running the example exchanged the attention modules; that was undone.
    assert model.attention_type == model.encoder.attention_type == "block_sparse"
    assert not prepared.swapped
    reason = prepared.refused[0].reason
    assert "full attention" in reason and "36 tokens" in reason
    # A prepared model may still switch when it is called.
    prepare(model, **inputs)
    other = copy.deepcopy(model)
    expected = run(other, short)
    assert_close(run(compiled(model)[0], short), expected, 2e-5)
    assert model.attention_type == "original_full"


def test_found_by_structure_not_by_name():
    model, inputs = longformer(layers=1)
    part = attentions(model)[0]
    part.__class__ = type("Anything", (type(part),), {})
    assert not prepare(model, **inputs).refused


def forward_doubled(self, *args, **kwargs):
    output = super(type(self), self).forward(*args, **kwargs)
    return (2 * output[0], *output[1:])


def test_other_mathematics_is_refused():
    for make in (longformer, bigbird):
        model, inputs = make(layers=2)
        first = attentions(model)[0]
        doubled = functools.wraps(type(first).forward)(forward_doubled)
        first.__class__ = type("Doubled", (type(first),), {"forward": doubled})
        with unchanged(model):
            prepared = prepare(model, **inputs)
        # The other layer is as it should be.
        kinds = [item.kind for item in prepared.swapped]
        assert kinds == [prepared.refused[0].kind]
        assert "differs from the original's" in prepared.refused[0].reason
        assert "forward" not in vars(first)


def test_refusals_give_reasons():
    model, inputs = longformer(layers=1)
    part = attentions(model)[0]

    def reason(prepared):
        assert not prepared.swapped
        return prepared.refused[0].reason

    other = type("Other", (type(part),), {"forward": lambda self, x, mask: (x,)})
    kind, part.__class__ = type(part), other
    assert "its forward takes x, mask" in reason(prepare(model))
    part.__class__ = kind

    part.dropout = torch.nn.Dropout(0.1)
    assert "dropout is not a number" in reason(prepare(model))
    del part.dropout
    part.dropout = 0.1

    broken = type("Broken", (kind,), {"_chunk": lambda *args: 1 / 0})
    part.__class__ = broken
    assert "could not be checked: ZeroDivisionError" in reason(prepare(model))
    part.__class__ = kind

    part.forward = functools.partial(kind.forward, part)
    assert "replaced on the instance already" in reason(prepare(model, **inputs))
    del part.forward

    prepare(model, **inputs)
    assert "earlier prepare()" in reason(prepare(model, **inputs))

    with torch.device("meta"):
        empty, _ = longformer(layers=1)
    assert "meta device" in reason(prepare(empty))

    model, inputs = bigbird(layers=1)
    attentions(model)[0].seed = None
    assert "has no seed" in reason(prepare(model, **inputs))


def test_a_wrong_example_fails_as_the_model_does():
    model, inputs = longformer(layers=1)
    with unchanged(model), pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        prepare(model, attention_mask=inputs["attention_mask"])
    with unchanged(model), pytest.raises(TypeError):
        prepare(model, None, None, None, None, None, None, None, None, None, None)


def test_the_report_reads():
    model, inputs = longformer()
    text = str(prepare(model, **inputs))
    assert text.splitlines()[0] == "3 replaced, 0 left alone"
    assert "encoder.layer.1.attention.self" in text and "no global tokens" in text
