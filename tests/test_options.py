"""Options are checked, and every complaint says what to write."""

import dataclasses

import pytest

import sparse_compiler as sc
from sparse_compiler.options import PASS_NAMES, Options
from sparse_compiler.passes import PASSES


def test_defaults():
    options = Options.parse(None)
    assert options == Options() == Options.parse({})
    assert options.passes == PASS_NAMES and options.selection == "measure"
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.verify = True


def test_every_named_pass_exists():
    assert set(PASS_NAMES) == set(PASSES)


def test_every_field_is_documented():
    for field in dataclasses.fields(Options):
        assert f"        {field.name}: " in Options.__doc__


def test_values_are_taken_over():
    given = {
        "passes": ["sparse_linear"],
        "verify": True,
        "min_speedup": 2,
        "selection": "model",
        "selection_budget": 0,
        "on_error": "raise",
        "fuel": 3,
        "inductor": {"max_autotune": True},
    }
    options = Options.parse(given)
    assert options.passes == ("sparse_linear",) and options.fuel == 3
    assert given["passes"] == ["sparse_linear"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verfy": True}, "Unknown option 'verfy'. Did you mean 'verify'?"),
        ({"zzz": 1}, "Unknown option 'zzz'. Known: 'approximate', "),
        ({"passes": "sparse_linear"}, "passes='sparse_linear': write a list of pass names"),
        ({"passes": ["linear"]}, "Unknown pass 'linear'."),
        ({"verify": 1}, "Option verify=1: write True or False"),
        ({"min_speedup": 0}, "min_speedup=0: write a positive number, such as 1.05"),
        ({"min_speedup": "2"}, "min_speedup='2': write a positive number"),
        ({"min_speedup": True}, "min_speedup=True: write a positive number"),
        ({"selection": "measured"}, "selection='measured'. Did you mean 'measure'?"),
        ({"selection_budget": -1}, "selection_budget=-1: write a number of seconds"),
        ({"approximate": ["int8"]}, "no approximation exists in this version"),
        ({"on_error": "ignore"}, 'on_error=\'ignore\': write "fallback" or "raise"'),
        ({"fuel": -1}, "fuel=-1: write a number of rewrites, or None"),
        ({"fuel": True}, "fuel=True: write a number of rewrites, or None"),
        ({"inductor": ["max_autotune"]}, "write a dict of Inductor settings"),
    ],
)
def test_complaints(given, message):
    with pytest.raises(sc.OptionError) as caught:
        Options.parse(given)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
