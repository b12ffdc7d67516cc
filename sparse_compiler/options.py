"""Options of the backend: one frozen dataclass, validated field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparse_compiler.errors import OptionError, nearest

PASS_NAMES = (
    "moe", "dead_channels", "sparse_linear", "attention", "linear_attention", "fold_static",
)  # fmt: skip
SELECTIONS = ("measure", "model", "always")


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="sparse", options={...})`` accepts.

    Attributes:
        passes: names of the passes to run, in this order (default: all of them).
        verify: while compiling, run every rewrite against the region it replaces on random
            inputs; one that disagrees is a ``VerificationError``, see ``on_error``.
        min_speedup: a rewrite is kept only if it is at least this many times faster than dense.
        selection: ``"measure"`` times dense against each legal format on this machine,
            ``"model"`` decides by bytes and flops, ``"always"`` takes the first legal format
            (for tests and debugging: the never-slower promise is off).
        selection_budget: seconds that one compilation may spend on timing; layers that are left
            when they are spent stay dense, and say so.
        approximate: names of approximations that may be used. Empty: every rewrite is exact.
        on_error: ``"fallback"`` leaves a region dense with one warning when a pass fails inside,
            ``"raise"`` raises ``PassError``.
        fuel: at most this many rewrites, ``None`` for no limit; halve it to find a bad rewrite.
        inductor: configuration patches handed on to Inductor.
    """

    passes: tuple[str, ...] = PASS_NAMES
    verify: bool = False
    min_speedup: float = 1.05
    selection: str = "measure"
    selection_budget: float = 60.0
    approximate: tuple[str, ...] = ()
    on_error: str = "fallback"
    fuel: int | None = None
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from the dict that ``torch.compile`` passes on.

        Raises:
            OptionError: an unknown name, or a value of the wrong type or range.
        """
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"options={given!r}: write a dict, such as {{'verify': True}}.")
        given = dict(given or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"Unknown option {name!r}.{nearest(name, known)}")
        for name in ("passes", "approximate"):
            if isinstance(given.get(name), (list, tuple)):
                given[name] = tuple(given[name])
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise OptionError(f"Option {name}={getattr(self, name)!r}: write {wanted}.")

        def is_number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        require(isinstance(self.passes, tuple), "passes", "a list of pass names")
        for name in self.passes:
            if name not in PASS_NAMES:
                raise OptionError(f"Unknown pass {name!r}.{nearest(str(name), PASS_NAMES)}")
        require(isinstance(self.verify, bool), "verify", "True or False")
        require(
            is_number(self.min_speedup) and self.min_speedup > 0,
            "min_speedup",
            "a positive number, such as 1.05",
        )
        if self.selection not in SELECTIONS:
            raise OptionError(
                f"Option selection={self.selection!r}.{nearest(str(self.selection), SELECTIONS)}"
            )
        require(
            is_number(self.selection_budget) and self.selection_budget >= 0,
            "selection_budget",
            "a number of seconds",
        )
        require(
            self.approximate == (),
            "approximate",
            "an empty list: no approximation exists in this version, every rewrite is exact",
        )
        require(self.on_error in ("fallback", "raise"), "on_error", '"fallback" or "raise"')
        require(
            self.fuel is None
            or (isinstance(self.fuel, int) and not isinstance(self.fuel, bool) and self.fuel >= 0),
            "fuel",
            "a number of rewrites, or None for no limit",
        )
        require(isinstance(self.inductor, Mapping), "inductor", "a dict of Inductor settings")
