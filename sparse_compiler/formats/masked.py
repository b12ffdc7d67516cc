"""The layouts of a trainable weight under a mask: its own, the transposed one, the ways between.

The weight stays a dense parameter. Its kept values are taken into stored order for the product,
from there into the transposed order for the gradient of the input; their gradients are put back.
"""

from __future__ import annotations

import dataclasses

import torch

from sparse_compiler.formats import blocking, csr


@dataclasses.dataclass(frozen=True)
class MaskLayout:
    """Tensors of a mask [out_features, in_features]; "stored" is csr order.

    Attributes:
        tensors: ``index`` int32 [stored], flat place of each stored value in the dense parameter,
            its size at filling; ``places`` and ``source``, the same sorted by place, and which
            stored value that is; ``multiplier`` [stored]; ``columns`` and ``segments``;
            ``transposed_order`` int32, the stored value at each place of the transposed layout,
            one past the last at filling; ``transposed_columns`` and ``transposed_segments``.
        k_block: of the layout.
        transposed_k_block: of the transposed one.
    """

    tensors: dict[str, torch.Tensor]
    k_block: int
    transposed_k_block: int


def pack(
    keeps: torch.Tensor,
    places: torch.Tensor,
    dtype: torch.dtype,
    *,
    group: int = 1,
    like: MaskLayout | None = None,
) -> MaskLayout:
    """The layouts of a mask.

    Args:
        keeps: the multiplier [out_features, in_features], 0 where the weight is masked.
        places: flat index of each weight in the dense parameter, of the same shape.
        dtype: of the weight that is multiplied.
        group: rows that share a column list.
        like: an earlier layout, whose k-blocks are to be used.
    """
    if max(keeps.shape) > blocking.MAX_UNITS:
        raise ValueError(f"{tuple(keeps.shape)} is above {blocking.MAX_UNITS}: 16-bit columns")
    structure = (keeps != 0).to(dtype)
    forward, _ = csr.pack(structure, group=group, k_block=like.k_block if like else None)
    backward, _ = csr.pack(structure.t(), k_block=like.transposed_k_block if like else None)
    stored = forward.element_index()
    outside = keeps.numel()
    # Where each weight is stored in the forward order; one past the end where it is not.
    position = stored.new_full((outside + 1,), stored.numel())
    position[stored] = torch.arange(stored.numel())
    position[outside] = stored.numel()
    rows, columns = keeps.shape
    transposed = backward.element_index()
    inside = transposed < outside
    turned = torch.where(inside, transposed % rows * columns + transposed // rows, outside)
    multiplier = torch.cat([keeps.flatten(), keeps.new_zeros(1)])
    index = torch.cat([places.flatten(), places.new_tensor([outside])])[stored].int()
    ascending = index.sort(stable=True)
    tensors = {
        "index": index,
        "places": ascending.values,
        "source": ascending.indices.int(),
        "multiplier": multiplier[stored],
        "columns": forward.columns,
        "segments": forward.segments,
        "transposed_order": position[turned].int(),
        "transposed_columns": backward.columns,
        "transposed_segments": backward.segments,
    }
    return MaskLayout(tensors, forward.k_block, backward.k_block)
