"""The only contact with Inductor's private API: compiling graphs, C++ templates, libraries.

For torch 2.11 to 2.13; the backend refuses others with a sentence, because a private API that moved
fails in ways nobody can read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch._inductor.lowering  # first: the template modules import each other in a circle
from torch import fx
from torch._inductor import config, ir, lowering
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateCaller, CppTemplateKernel
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa
from torch._inductor.lowering import register_lowering
from torch._inductor.runtime.runtime_utils import cache_dir
from torch._inductor.utils import Placeholder, parallel_num_threads, sympy_index_symbol
from torch._inductor.virtualized import ops

from sparse_compiler.codegen import cpp
from sparse_compiler.errors import OptionError, nearest


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Inductor's code for a graph; takes ownership of ``gm``."""
    compiled: Any = compile_fx(gm, list(inputs), config_patches=dict(patches or {}) or None)
    return compiled


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for ``torch.compile(mode=...)``."""
    if mode is None or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what Inductor does not know.

    Raises:
        OptionError: the name of the setting, and those like it.
    """
    known = config.get_config_copy()
    for name in settings:
        if name not in known:
            raise OptionError(f"Inductor has no setting {name!r}.{nearest(str(name), known)}")


def vector_isa() -> int:
    """Width in bits of the vectors kernels may use: 512 (AVX-512), 256 (AVX2) or 0 (portable)."""
    isa = pick_vec_isa()
    if isa is invalid_vec_isa or not str(isa).startswith(("avx512", "avx2")):
        return 0
    return 512 if isa.bit_width() >= 512 else 256


def num_threads() -> int:
    """Threads that generated CPU kernels use."""
    return parallel_num_threads()


def load_library(source: str) -> Any:
    """Compile C++ to a shared library, or find it in Inductor's cache; a ``ctypes.CDLL``."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def cache_directory() -> Path:
    """Where Inductor keeps compiled code (``TORCHINDUCTOR_CACHE_DIR``)."""
    return Path(cache_dir())


@contextlib.contextmanager
def patched(**settings: Any) -> Iterator[None]:
    """Inductor's configuration with some settings changed, for tests."""
    with config.patch(settings):
        yield


class KernelTemplate(CppTemplate):
    """A C++ kernel of this package whose finished tiles go through Inductor's fused epilogue.

    Args:
        kernel: which kernel, with its literals.
        input_nodes: its tensors, in the order of ``kernel.inputs``.
        layout: of the result.
    """

    def __init__(self, kernel: cpp.Kernel, input_nodes: list[ir.IRNode], layout: ir.Layout) -> None:
        super().__init__(kernel.name, input_nodes, layout, num_threads())
        self.kernel = kernel

    def result(self) -> ir.TensorBox:
        """The node of the graph's IR; its source is rendered when its epilogue is known.

        ``CppTemplate.generate`` would render it twice, once for a benchmark that never runs.
        """

        def make_kernel_render(
            template_node: ir.CppTemplateBuffer,
            flag_template_buffer_has_other_users: bool,
            epilogue_nodes: list[ir.IRNode] | None = None,
        ) -> tuple[CppTemplateKernel, Callable[[], str]]:
            kernel = CppTemplateKernel(str(Placeholder.KERNEL_NAME), self.num_threads)
            render = functools.partial(
                kernel.render,
                self,
                product=template_node,
                product_is_used=flag_template_buffer_has_other_users,
                epilogue_nodes=epilogue_nodes,
            )
            return kernel, render

        # Annotated more narrowly than it is used: the render function is called, not printed.
        caller: Any = CppTemplateCaller
        return caller(
            f"cpp_{self.name}_{self.index}",
            self.name,
            self.input_nodes,
            self.layout,
            make_kernel_render,
            None,
            self,
        ).output_node()

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        product: ir.CppTemplateBuffer,
        product_is_used: bool,
        epilogue_nodes: list[ir.IRNode] | None,
    ) -> str:
        """The C++ source, with the epilogue nodes fused into the store of each tile."""
        source: Any = product
        output: Any = product
        target: Any = product
        aliases: list[str] = []
        epilogues: list[Any] = []
        reindexers: list[Any] = []
        if epilogue_nodes:
            if product_is_used:
                # The product itself is wanted, too: a first epilogue writes it out.
                source = ir.Buffer(name=f"{product.get_name()}_tile", layout=product.layout)
                epilogues.append(_copy_of(source, product))
                reindexers.append(None)
            aliases.append(source.get_name())
            epilogues.extend(epilogue_nodes)
            output = epilogue_nodes[-1]
            # One by one: taken together, only the last one's shape would count.
            for node in epilogue_nodes:
                buffer: Any = node
                target, reindexers = gen_2d_view_of_epilogue_buf(
                    buffer, product, [node], reindexers, [None]
                )
        tile = ir.Buffer(
            name="tile",
            layout=ir.FixedLayout(torch.device("cpu"), torch.float32, list(self.kernel.tile)),
        )
        # Symbols rather than strings, which Inductor would parse at the cost of milliseconds.
        ranges = [
            (sympy_index_symbol(start), sympy_index_symbol(end))
            for start, end in self.kernel.ranges
        ]

        store_output: Any = kernel.store_output

        def store() -> str:
            return store_output(
                kernel.slice_nd(target, ranges),
                kernel.slice_nd(tile, [(sympy.S.Zero, end - start) for start, end in ranges]),
                source,
                epilogues,
                offsets=[start for start, _ in ranges],
                reindexers=reindexers,
            )

        nodes = dict(zip(self.kernel.inputs, self.input_nodes, strict=True))
        x = nodes["X"]

        def start(name: str) -> str:
            # The argument is the whole buffer, of which the input may be a view with an offset.
            return f"(&{kernel.index(nodes[name], [0] * len(nodes[name].get_size()))})"

        return _template(self.kernel.template).render(
            kernel=kernel,
            header=self.header().getvalue(),
            isa=vector_isa(),
            headers=cpp.headers(self.kernel.name),
            name=self.kernel.name,
            inputs=nodes,
            nodes=nodes,
            start=start,
            Y=output,
            product=product,
            aliases={alias: output.get_name() for alias in aliases},
            element="F32" if x.get_dtype() is torch.float32 else "BF16",
            static_rows=_static(x.get_size()[0]),
            num_threads=self.num_threads,
            store=store,
            **self.kernel.literals,
        )


@functools.cache
def _template(name: str) -> Any:
    # Inductor's environment, whose undefined names are errors.
    return CppTemplate._template_from_string(cpp.template(name))


def _static(size: Any) -> int:
    """A size as an int, -1 if it is known at run time only."""
    return int(size) if getattr(size, "is_number", isinstance(size, int)) else -1


def _copy_of(source: ir.Buffer, product: ir.Buffer) -> ir.ComputedBuffer:
    loader = source.make_loader()
    dtype = product.get_dtype()
    return ir.ComputedBuffer(
        name=product.get_name(),
        layout=product.layout,
        data=ir.Pointwise(
            device=torch.device("cpu"),
            dtype=dtype,
            inner_fn=lambda index: ops.to_dtype(loader(index), dtype),
            ranges=product.get_size(),
        ),
    )


def lower_kernel(
    kernel: cpp.Kernel, tensors: Sequence[ir.TensorBox], dtype: torch.dtype, size: Sequence[Any]
) -> ir.TensorBox:
    """The IR of a kernel's contiguous result of this dtype and size."""
    nodes = []
    for name, tensor in zip(kernel.inputs, tensors, strict=True):
        tensor.realize()
        node: Any = tensor
        if name in kernel.strided:
            node = _row_major(tensor)
        nodes.append(ir.ExternKernel.realize_input(node))
    strides = ir.FlexibleLayout.contiguous_strides(list(size))
    layout = ir.FixedLayout(torch.device("cpu"), dtype, list(size), strides)
    return KernelTemplate(kernel, nodes, layout).result()


def _row_major(tensor: Any) -> Any:
    """A matrix whose rows are contiguous, copied if need be; they may be padded or repeated."""
    if 0 in tensor.get_size():  # views of nothing have no strides
        tensor = ir.ExternKernel.copy_input(tensor)
    node: Any = ir.ExternKernel.require_stride_order(tensor, [1, 0])
    # A stride order says nothing of steps: x[:, ::2] and an expanded column are in order, too.
    columns, step = node.get_size()[1], node.get_stride()[1]
    if step == 1 or columns == 1:
        return node
    return ir.ExternKernel.require_stride_order(ir.ExternKernel.copy_input(node), [1, 0])


def flattened(tensor: Any) -> ir.TensorBox:
    """A tensor as one contiguous dimension, copied if it does not lie so."""
    flat: Any = lowering.view(tensor, [tensor.get_numel()])
    return flat


def register(operator: Any, lowering: Callable[..., Any]) -> None:
    """Make Inductor lower an operator with this function."""
    register_lowering(operator, type_promotion_kind=None)(lowering)
