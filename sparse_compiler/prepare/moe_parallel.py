"""Layers that split sorted tokens among experts, as JetMoE has them: recognised, left alone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.prepare.moe_source import Source
from sparse_compiler.prepare.registry import Calls, Case, Preparer


class ParallelExperts(Preparer):
    """One linear layer an expert, for tokens that another module has sorted and counted."""

    name = "parallel experts"

    def find(self, module: nn.Module) -> bool:
        own = list(module.parameters())
        if len(own) != 1 or own[0].dim() != 3 or len(list(module.children())):
            return False
        try:
            source = Source(type(module).forward)
        except Refused:
            return False
        return len(source.parameters) == 3 and any(
            isinstance(item, ast.Call)
            and getattr(item.func, "attr", "") == "split"
            and source.parameters[2] in {getattr(argument, "id", "") for argument in item.args}
            for item in ast.walk(source.tree)
        )

    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        return (
            "its tokens come sorted, with their counts as Python numbers: the tolist() of the "
            "router that counted them cuts the graph, which cannot be seen from here; "
            "torch._dynamo.config.capture_scalar_outputs = True keeps it whole"
        )

    def cases(self, module: nn.Module, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        return ()

    def forward(self) -> Callable[..., Any]:
        return type(self).forward
