"""What runs when the compiled model is called: look at the weights, then run the code.

A packed weight is a copy. Before every call each source is compared with what was packed: is it
the same tensor, at the same version? (Two attribute reads a weight.) If not, it is packed again;
if the new one does not fit the compiled code, this call and the next ones run Dynamo's own graph,
dense, and once the weights have stopped changing that graph is compiled anew. ``refresh`` is for
the few ways of writing that change no version.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compiler.derived import PLAIN, Derived, DoesNotFit, has_version
from sparse_compiler.memory import gathered
from sparse_compiler.passes.base import log

# Sets of packed weights that one compiled graph keeps, for models that take turns.
_MOST_STATES = 4
# Calls with unchanged weights after which a dense fallback is compiled anew.
_SETTLED_CALLS = 3


class Source:
    """A weight as it was when it was packed.

    The tensor, its version and its memory have to be the same: ``module.to(dtype)`` and
    ``torch.nn.utils.prune.remove`` assign ``parameter.data``, which changes no version. The memory
    is kept for as long as the tensor lives, so that no other tensor can get its address.

    Args:
        position: of the weight among the graph's arguments.
        tensor: the weight. Its version is read now, so make this before its values are read:
            another thread may write to it.
    """

    __slots__ = ("_address", "_held", "position", "tensor", "version")

    def __init__(self, position: int, tensor: torch.Tensor) -> None:
        self.position = position
        self.version = tensor._version
        held = [tensor.detach()]
        self.tensor = weakref.ref(tensor, lambda _: held.clear())
        self._address = held[0].data_ptr()
        self._held = held

    def doubted(self) -> Source:
        """This weight, to be packed again whatever its version."""
        other = copy.copy(self)
        other.version = -1
        return other

    def unchanged(self, args: Sequence[Any]) -> bool:
        value: Any = args[self.position]
        same = value is self.tensor()
        return same and value._version == self.version and value.data_ptr() == self._address


@dataclasses.dataclass(frozen=True)
class _State:
    """Packed weights and the sources they belong to; replaced as a whole, never edited."""

    packed: tuple[torch.Tensor, ...]
    sources: tuple[Source, ...]
    exposed: tuple[tuple[torch.Tensor, int], ...]

    def belongs_to(self, args: Sequence[Any]) -> bool:
        """Whether these are the packed weights for a call with ``args``."""
        for source in self.sources:
            if not source.unchanged(args):
                return False
        return all(tensor._version == version for tensor, version in self.exposed)


class GuardedCall:
    """A compiled graph that notices when the weights it was packed from change.

    Args:
        compiled: takes the graph's arguments and then the packed tensors.
        dense: Dynamo's graph, which takes the arguments alone.
        packed: names and tensors of the packed buffers, in the order ``compiled`` takes them.
        derived: how each was made.
        inputs: names of the graph's arguments.
        seen: the weights among them, by position, as they were before any was packed.
        recompile: makes a new compiled callable from ``dense``.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        dense: fx.GraphModule,
        packed: dict[str, torch.Tensor],
        derived: Sequence[Derived],
        inputs: Sequence[str],
        seen: Mapping[int, Source],
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
        self._positions = sorted({self._inputs[leaf] for item in derived for leaf in item.leaves})
        sources = tuple(seen[position] for position in self._positions)
        self._gather(self._names, packed)
        # Dynamo runs models of one architecture through the same code: one state for each.
        first = self._snapshot(tuple(packed.values()), sources)
        self._states: tuple[_State, ...] = (first,)
        _watch_fused_optimizers()
        live.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run on the graph's arguments."""
        for state in self._states:
            if state.belongs_to(args):
                return self._compiled(*args, *state.packed)
        return self._stale(args)

    def refresh(self) -> None:
        """Pack everything again at the next call, whatever the versions say."""
        with self._lock:
            self._states = tuple(
                dataclasses.replace(state, sources=tuple(s.doubted() for s in state.sources))
                for state in self._states
            )

    def uses(self, tensors: set[int]) -> bool:
        """Whether any of the tensors with these ids was packed."""
        return any(id(s.tensor()) in tensors for state in self._states for s in state.sources)

    def _gather(self, names: Sequence[str], packed: dict[str, torch.Tensor]) -> None:
        """Move packed tensors side by side, but for those that the model hands out."""
        ours = [name for name in names if name not in self._exposed_names()]
        # What is made under inference_mode() would have no version.
        with torch.inference_mode(False):
            packed.update(zip(ours, gathered([packed[name] for name in ours]), strict=True))

    def _exposed_names(self) -> set[str]:
        return {name for item in self._derived if item.exposed for name in item.attributes}

    def _sources(self, args: Sequence[Any]) -> tuple[Source, ...]:
        return tuple(Source(position, args[position]) for position in self._positions)

    def _snapshot(self, packed: tuple[torch.Tensor, ...], sources: tuple[Source, ...]) -> _State:
        by_name = dict(zip(self._names, packed, strict=True))
        handed_out = [by_name[name] for name in sorted(self._exposed_names())]
        exposed = tuple((tensor, tensor._version) for tensor in handed_out)
        return _State(packed, sources, exposed)

    def _stale(self, args: Sequence[Any]) -> Any:
        state = None
        with self._lock:
            if self._replacement is None:
                state = self._repack(args)
                # What was packed from these weights before is out of date, and so are the dead.
                now = {id(args[position]) for position in self._positions}
                valid = [
                    old
                    for old in self._states
                    if not any(s.tensor() is None or id(s.tensor()) in now for s in old.sources)
                ]
                if state is None:
                    self._states = tuple(valid)
                    self._note_stale_call(args)
                else:
                    self._states = (state, *valid)[:_MOST_STATES]
            replacement = self._replacement
        if state is not None:
            return self._compiled(*args, *state.packed)
        return (self.dense if replacement is None else replacement)(*args)

    def _repack(self, args: Sequence[Any]) -> _State | None:
        """New packed weights for the present sources, or None if the code cannot take them."""
        if not self._states:
            return None
        # Whatever is unchanged in the state that is nearest to the arguments is kept.
        state = max(self._states, key=lambda s: sum(x.unchanged(args) for x in s.sources))
        packed = dict(zip(self._names, state.packed, strict=True))
        changed = {s.position for s in state.sources if not s.unchanged(args)}
        written = {id(tensor) for tensor, version in state.exposed if tensor._version != version}
        target = "a weight"
        try:
            weights = [args[position] for position in self._positions]
            if not all(type(w) in PLAIN and has_version(w) for w in weights):
                raise DoesNotFit("it has become a tensor whose changes cannot be seen")
            sources = self._sources(args)  # before their values are read
            for item in self._derived:
                target = item.target
                positions = [self._inputs[leaf] for leaf in item.leaves]
                touched = any(id(packed[name]) in written for name in item.attributes)
                if not touched and not changed & set(positions):
                    continue
                # As in `_gather`.
                with torch.inference_mode(False):
                    value = item.expression.evaluate([args[position] for position in positions])
                    new = item.remake(value)
                for name, tensor in zip(item.attributes, new, strict=True):
                    if tensor.shape != packed[name].shape or tensor.dtype != packed[name].dtype:
                        raise DoesNotFit("it has another shape or dtype")
                    packed[name] = tensor
            before = zip(self._names, state.packed, strict=True)
            self._gather([name for name, old in before if packed[name] is not old], packed)
        except Exception as error:
            log.info("%s changed: %s; running dense", target, error)
            return None
        log.debug("packed %d changed weights again", len(changed))
        return self._snapshot(tuple(packed.values()), sources)

    def _note_stale_call(self, args: Sequence[Any]) -> None:
        """Count dense calls with the same weights; compile anew once they have settled."""
        self.stale_calls += 1
        now = tuple(
            (id(args[p]), -1 if args[p].is_inference() else args[p]._version)
            for p in self._positions
        )
        self._settled_calls = self._settled_calls + 1 if now == self._settling else 0
        self._settling = now
        if self._settled_calls >= _SETTLED_CALLS:
            log.info("the changed weights have settled: compiling anew")
            self._replacement = self._recompile(self.dense)


@functools.cache
def _watch_fused_optimizers() -> None:
    """Fused optimizers write to parameters and leave their versions as they were."""

    def bump(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                written = [p for p in group["params"] if p.grad is not None]
                torch.autograd.graph.increment_version(written)

    register_optimizer_step_post_hook(bump)


def watch(args: Sequence[Any]) -> dict[int, Source]:
    """Every argument of a graph that a guarded call could be packed from, by position."""
    return {
        position: Source(position, value)
        for position, value in enumerate(args)
        if type(value) in PLAIN and value.layout is torch.strided and has_version(value)
    }


# Every guarded call that is still in use, for ``refresh``.
live: weakref.WeakSet[GuardedCall] = weakref.WeakSet()


def refresh(compiled: Any) -> int:
    """Pack a compiled model's weights again at its next call.

    Only needed after edits that leave no trace, past the version counter: writes through
    ``parameter.data``, ``parameter.numpy()``, DLPack or the storage. Write ``with torch.no_grad():
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
