"""``prepare``: the door for models that break Dynamo's graph where they are sparse.

A backend sees a model only after Dynamo has cut it. Hand-sparse attention (Longformer, LED,
BigBird) loops over ``nonzero()``, calls ``.item()`` and draws plans with numpy, so it never arrives
whole. ``prepare`` finds such modules by their structure, replaces what they compute, for compiled
code only, by the same thing in plain PyTorch with a mask, and leaves it to the compiler to skip
what is masked. Mixtures of experts ask the data which tokens each expert gets: there the loop over
experts becomes one operator, and the rest of the function stays the user's. Parameters,
``state_dict`` keys and eager behaviour stay as they are.

A new kind of module is one more ``Preparer``, handed to ``register``.
"""

from __future__ import annotations

from sparse_compiler.prepare.bigbird import BigBirdAttention
from sparse_compiler.prepare.longformer import LongformerAttention, LongformerEncoder
from sparse_compiler.prepare.moe import MixtureOfExperts
from sparse_compiler.prepare.moe_one_hot import CapacityRouter
from sparse_compiler.prepare.moe_parallel import ParallelExperts
from sparse_compiler.prepare.registry import Calls, Case, Preparer, register
from sparse_compiler.prepare.report import Prepared, Refused, Swapped
from sparse_compiler.prepare.run import compile, prepare

# The encoder looks at which of its attention modules were replaced, so it comes behind them.
register(LongformerAttention())
register(LongformerEncoder())
register(BigBirdAttention())
register(MixtureOfExperts())
register(ParallelExperts())
register(CapacityRouter())

__all__ = [
    "Calls",
    "Case",
    "Prepared",
    "Preparer",
    "Refused",
    "Swapped",
    "compile",
    "prepare",
    "register",
]
