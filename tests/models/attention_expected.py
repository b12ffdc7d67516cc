"""What each attention of a model has to become, for `Subject.expected`.

A name means that the site has to be rewritten and that its pattern contains the name; None that it
has to stay as it is: nothing is masked, `is_causal=True` says it all, or skipping would be wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Expected = Mapping[str, tuple[str | None, ...]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The names of a decoder layer's mask.

    Attributes:
        prefill: queries and keys are the same tokens.
        continued: the second call with a dynamic cache.
        static: a prefill into a static cache.
        step: one token, with a static cache.
    """

    prefill: str
    continued: str
    static: str
    step: str


CAUSAL = Layer("causal", "causal with an offset", "causal in position ids", "keys up to a position")


def sliding(window: int) -> Layer:
    """A causal sliding window; a static cache of it holds no more keys than the window."""
    name = f"causal & sliding window {window}"
    offset = f"causal with an offset & sliding window {window}"
    return Layer(name, offset, name, f"sliding window {window} up to a position")


def chunked(size: int) -> Layer:
    """Causal in chunks, as in Llama 4."""
    name = f"causal & chunks of {size}"
    step = f"keys up to a position & chunk of {size} at a position"
    return Layer(name, f"causal with an offset & chunks of {size}", name, step)


def decoder(*layers: Layer, flagged: bool = False, terms: str = "") -> Expected:
    """Of a decoder, in every variant.

    Args:
        layers: its layers.
        flagged: with a cache, `sdpa` is told `is_causal` where a layer is just causal and nothing
            is padded; without one Hugging Face looks for packed sequences, which takes a mask.
        terms: what else is done to the scores, as in ", ALiBi".
    """

    def names(kind: str, padding: str = "") -> tuple[str, ...]:
        return tuple(f"{getattr(layer, kind)}{padding}{terms}" for layer in layers)

    prefill, padded = names("prefill"), names("prefill", " & padding")
    # A static cache is longer than the padding mask, which ends at the prefill's last token.
    behind = tuple(
        " & keys up to 129 & padding" if "position" in layer.static else " & padding"
        for layer in layers
    )
    static = tuple(f"{a.static}{b}{terms}" for a, b in zip(layers, behind, strict=True))
    found: dict[str, tuple[str | None, ...]] = {
        "none": prefill,
        "ones": padded,
        "cache": prefill,
        "cache left": padded,
        "continue": prefill + names("continued"),
        "decode": names("static") + names("step"),
        "decode left": static + names("step", " & padding"),
        "train": prefill,
        "train right": padded,
    }
    if flagged:
        left = tuple(None if layer is CAUSAL else layer.prefill for layer in layers)
        found["sdpa cache"] = left
        found["sdpa continue"] = left + names("continued")
    return found


def encoder(*layers: str) -> Expected:
    """Of an encoder, in every variant: a name for each layer, "" where it masks padding only."""
    alone = tuple(name or None for name in layers)
    padded = tuple(f"{name} & padding" if name else "padding" for name in layers)
    return {"none": alone, "ones": padded, "train": alone, "train right": padded}


def always(*names: str | None) -> Expected:
    """The same in every variant."""
    variants = ("none", "ones", "right", "left", "train", "train right")
    return dict.fromkeys(variants, names)


def _t5() -> Expected:
    encoder_layers, causal = (None, None), "causal, bias tensor"
    alone = (*encoder_layers, *(causal, None) * 2)
    later = (*encoder_layers, *("causal with an offset, bias tensor", None) * 2)
    padded = (*("padding, bias tensor",) * 2, *(causal, "padding") * 2)
    first = {"none": alone, "cache": alone, "train": alone, "continue": alone + later}
    return {**first, "ones": padded, "cache left": padded, "train right": padded}


T5 = _t5()

# Longformer's and BigBird's own code has no product that could be skipped: scores are cut into
# overlapping chunks or blocks by hand, and copied. Longformer's graphs serve padding masks as well.
LONGFORMER: Expected = {
    "none": (None, None), "ones": (), "train": (None, None), "train right": (),
}  # fmt: skip
BIGBIRD: Expected = {"none": (None,) * 5, "ones": (None,) * 5}

_LOCAL_AND_GLOBAL = "(local window 16 to either side & padding | global tokens) & padded queries"
_BLOCKS = "(local window 1 to either side in blocks of 16 | global blocks of 16)"
_RANDOM = "global, window and random blocks of 16"
# And what `prepare` makes of them. 11 of BigBird's blocks of 16 leave no tile of 64 empty.
PREPARED: Mapping[str, Expected] = {
    "longformer_global": always(*(_LOCAL_AND_GLOBAL, "padded queries & padding") * 2),
    "bigbird": {
        "none": (None, None),
        "ones": (f"{_BLOCKS} & padded queries & padding, some pairs count 2 times",) * 2,
        "train": (None, None),
        "train right": (_RANDOM, _RANDOM),
    },
}
