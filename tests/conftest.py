"""Shared settings of the tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Compiling takes seconds, so no deadline; CI repeats the same examples in every run.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo() -> None:
    """Compiled fixtures live for one module; Dynamo's limits on recompiling are per function."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
