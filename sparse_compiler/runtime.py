"""What runs when the compiled model is called: look at the weights, then run the code.

A packed weight is a copy. Before every call each source is compared with what was packed: is it
the same tensor, at the same version? (Two attribute reads a weight.) If not, it is packed again;
if the new one does not fit the compiled code, this call and the next ones run Dynamo's own graph,
dense, and once the weights have stopped changing that graph is compiled anew. Nothing stale is
ever multiplied.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import Derived, DoesNotFit, has_version
from sparse_compiler.passes.base import log

# Calls with unchanged weights after which a dense fallback is compiled anew.
_SETTLED_CALLS = 3


class _Source:
    """A weight as it was when it was packed.

    The tensor, its version and its memory have to be the same: ``module.to(dtype)`` and
    ``torch.nn.utils.prune.remove`` assign ``parameter.data``, which changes no version. The memory
    is kept for as long as the tensor lives, so that no other tensor can get its address.

    Args:
        position: of the weight among the graph's arguments.
        tensor: the weight.
        seen: whether the packed copy is good; if not, the weight counts as changed.
    """

    __slots__ = ("_address", "_held", "position", "tensor", "version")

    def __init__(self, position: int, tensor: torch.Tensor, *, seen: bool = True) -> None:
        held = [tensor.detach()]
        self.position = position
        self.tensor = weakref.ref(tensor, lambda _: held.clear())
        self.version = tensor._version if seen else -1
        self._address = tensor.data_ptr()
        self._held = held

    def unchanged(self, args: Sequence[Any]) -> bool:
        value = args[self.position]
        return (
            value is self.tensor()
            and value._version == self.version
            and value.data_ptr() == self._address
        )


@dataclasses.dataclass(frozen=True)
class _State:
    """Packed weights and the sources they belong to; replaced as a whole, never edited."""

    packed: tuple[torch.Tensor, ...]
    sources: tuple[_Source, ...]
    exposed: tuple[tuple[torch.Tensor, int], ...]


class GuardedCall:
    """A compiled graph that notices when the weights it was packed from change.

    Args:
        compiled: takes the graph's arguments and then the packed tensors.
        dense: Dynamo's graph, which takes the arguments alone.
        packed: names and tensors of the packed buffers, in the order ``compiled`` takes them.
        derived: how each was made.
        inputs: names of the graph's arguments.
        example: their values at compile time.
        recompile: makes a new compiled callable from ``dense``.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        dense: fx.GraphModule,
        packed: dict[str, torch.Tensor],
        derived: Sequence[Derived],
        inputs: Sequence[str],
        example: Sequence[Any],
        recompile: Callable[[fx.GraphModule], Callable[..., Any]],
    ) -> None:
        self.dense = dense
        self.stale_calls = 0
        self._compiled = compiled
        self._names = tuple(packed)
        self._derived = tuple(derived)
        self._inputs = {name: i for i, name in enumerate(inputs)}
        self._recompile = recompile
        self._lock = threading.Lock()
        self._replacement: Callable[..., Any] | None = None
        self._settling: tuple[tuple[int, int], ...] = ()
        self._settled_calls = 0
        self._state: _State | None = self._snapshot(tuple(packed.values()), example)
        live.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run on the graph's arguments."""
        state = self._state
        if state is not None:
            for source in state.sources:
                if not source.unchanged(args):
                    break
            else:
                if all(tensor._version == version for tensor, version in state.exposed):
                    return self._compiled(*args, *state.packed)
        return self._stale(args)

    def refresh(self) -> None:
        """Pack everything again at the next call, whatever the versions say."""
        with self._lock:
            if self._replacement is None:
                state = self._state
                if state is not None:
                    self._state = dataclasses.replace(
                        state,
                        sources=tuple(dataclasses.replace(s, version=-1) for s in state.sources),
                    )

    def uses(self, tensors: set[int]) -> bool:
        """Whether any of the tensors with these ids was packed."""
        state = self._state
        return state is not None and any(id(s.tensor()) in tensors for s in state.sources)

    def _snapshot(self, packed: tuple[torch.Tensor, ...], args: Sequence[Any]) -> _State:
        positions = {self._inputs[leaf] for item in self._derived for leaf in item.leaves}
        sources = tuple(
            _Source(position, args[position]) for position in sorted(positions)
        )
        by_name = dict(zip(self._names, packed, strict=True))
        exposed = tuple(
            (by_name[name], by_name[name]._version)
            for item in self._derived
            if item.exposed
            for name in item.attributes
        )
        return _State(packed, sources, exposed)

    def _stale(self, args: Sequence[Any]) -> Any:
        with self._lock:
            if self._replacement is None:
                state = self._repack(args)
                if state is not None:
                    self._state = state
                    return self._compiled(*args, *state.packed)
                self._state = None
                self._note_stale_call(args)
            replacement = self._replacement
        return (self.dense if replacement is None else replacement)(*args)

    def _repack(self, args: Sequence[Any]) -> _State | None:
        """New packed weights for the present sources, or None if the code cannot take them."""
        state = self._state
        if state is None:
            return None
        packed = dict(zip(self._names, state.packed, strict=True))
        changed = {s.position for s in state.sources if not s.unchanged(args)}
        written = {id(tensor) for tensor, version in state.exposed if tensor._version != version}
        for item in self._derived:
            positions = [self._inputs[leaf] for leaf in item.leaves]
            touched = any(id(packed[name]) in written for name in item.attributes)
            if not touched and not changed & set(positions):
                continue
            values = [args[position] for position in positions]
            try:
                if not all(type(v) in _PLAIN and has_version(v) for v in values):
                    raise DoesNotFit("it has become a tensor whose changes cannot be seen")
                new = item.remake(item.expression.evaluate(values))
            except Exception as error:
                log.info("%s changed: %s; running dense", item.target, error)
                return None
            for name, tensor in zip(item.attributes, new, strict=True):
                if tensor.shape != packed[name].shape or tensor.dtype != packed[name].dtype:
                    log.info("%s changed its shape or dtype; running dense", item.target)
                    return None
                packed[name] = tensor
        log.debug("packed %d changed weights again", len(changed))
        return self._snapshot(tuple(packed.values()), args)

    def _note_stale_call(self, args: Sequence[Any]) -> None:
        """Count dense calls with the same weights; compile anew once they have settled."""
        self.stale_calls += 1
        positions = sorted({self._inputs[leaf] for item in self._derived for leaf in item.leaves})
        now = tuple(
            (id(args[p]), -1 if args[p].is_inference() else args[p]._version) for p in positions
        )
        self._settled_calls = self._settled_calls + 1 if now == self._settling else 0
        self._settling = now
        if self._settled_calls >= _SETTLED_CALLS:
            log.info("the changed weights have settled: compiling anew")
            self._replacement = self._recompile(self.dense)


_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Every guarded call that is still in use, for ``refresh``.
live: weakref.WeakSet[GuardedCall] = weakref.WeakSet()


def refresh(compiled: Any) -> int:
    """Pack a compiled model's weights again at its next call.

    Only needed after edits that leave no trace: ``parameter.data`` is written past the version
    counter, so ``parameter.data[...] = 0`` cannot be seen. Write ``with torch.no_grad():
    parameter[...] = 0`` instead, and no refresh is needed.

    Args:
        compiled: the module that was compiled, or what ``torch.compile`` returned.

    Returns:
        How many compiled graphs will be refreshed.
    """
    if isinstance(compiled, torch.nn.Module):
        tensors = [*compiled.parameters(), *compiled.buffers()]
        known = {id(tensor) for tensor in tensors}
        calls = [call for call in live if call.uses(known)]
    else:
        calls = list(live)
    for call in calls:
        call.refresh()
    return len(calls)
