"""Results that parameters and buffers alone decide are computed once.

``torch.nn.utils.prune`` multiplies weight and mask in every forward and leaves the product on the
module, so the product is a result of the graph. In inference it is computed while compiling and
again when weight or mask have changed.
"""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.derived import PLAIN, derive, has_version
from sparse_compiler.passes.base import Pass, Rewrite
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.static import StaticValues


class FoldStatic(Pass):
    """Folds static results of an inference graph."""

    name = "fold_static"

    def run(self, gm: fx.GraphModule) -> None:
        """Find, check, rewrite."""
        if self.context.training:
            return
        static = StaticValues(gm, training=False)
        (output,) = gm.graph.find_nodes(op="output")
        for node in list(dict.fromkeys(output.all_input_nodes)):
            if node.op != "call_function" or not static.is_static(node):
                continue
            expression = static.expression(node)
            assert expression is not None
            leaves = static.leaf_values(expression)
            if not isinstance(node.meta["val"], torch.Tensor):
                continue
            if not all(has_version(leaf) and type(leaf) in PLAIN for leaf in leaves):
                continue
            name = " and ".join(static.name(leaf) for leaf in expression.leaves)
            rewrite = Rewrite("constant", name, tuple(node.meta["val"].shape))
            self.context.rewrites.append(rewrite)
            try:
                self._fold(gm, node, static, rewrite)
            except Exception as error:
                self.context.failed(rewrite, error)

    def _fold(
        self, gm: fx.GraphModule, node: fx.Node, static: StaticValues, rewrite: Rewrite
    ) -> None:
        if self.context.out_of_fuel():
            rewrite.reason = "options['fuel'] is used up"
            return
        expression = static.expression(node)
        assert expression is not None
        value = static.value(node)
        assert value is not None
        attributes: list[str] = []

        def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
            constant = builder.constant("folded", value.clone())
            attributes.append(str(constant.target))
            return constant

        replace_region(gm, Region.of([node]), build, rule=self.name)
        gm.meta.setdefault("derived", []).append(
            derive(
                attributes,
                expression,
                lambda value: [value.clone()],
                rewrite.target,
                exposed=True,
            )
        )
        rewrite.applied, rewrite.format = True, "constant"
        rewrite.reason = "parameters and buffers alone decide it: computed once"
