"""Mixtures of experts whose experts are called in a Python loop.

A loop over experts asks the data which tokens each of them gets (``nonzero``, ``tolist``,
``if mask.any()``), which cuts Dynamo's graph. Only the loop is replaced, by one call of the
operator; the router, shared experts and all that is returned stay the user's own code.

How: the function's source is run once with its variables written down in front of the loop and
behind it (``moe_source``); a reading of them as tokens, experts and weights that gives the loop's
result is searched (``moe_roles``); an expert is recorded and read as two linear layers and what is
between them (``moe_record``). What comes out is compared with the original, outputs and gradients.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_compiler.experts import Experts
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.prepare import moe_find
from sparse_compiler.prepare.agree import attempt, disagreement
from sparse_compiler.prepare.moe_inputs import Form, forms
from sparse_compiler.prepare.moe_roles import Dispatch, Match, dispatch, matches
from sparse_compiler.prepare.moe_source import CALL, PROBE, Place, Source
from sparse_compiler.prepare.registry import Calls, Case, Preparer
from sparse_compiler.prepare.swap import replacing

_MOST_MATCHES = 8


@dataclasses.dataclass(frozen=True)
class Edit:
    """One loop of one function, and what stands for it."""

    function: str
    place: Place
    index: int
    result: str
    dispatch: Dispatch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to all modules that run the same code.

    Attributes:
        edits: the loops that are replaced.
        form: how the module is called, for the check.
        experts: where its experts are.
        only_eval: whether training, where an expert is random, is left to the original.
        cases: names of the inputs that the original takes.
    """

    edits: tuple[Edit, ...]
    form: Form
    experts: Experts
    only_eval: bool
    cases: tuple[str, ...]


class Rewritten:
    """A function with its loops replaced, for compiled code; the original for eager calls.

    Copied and pickled as what it is made of: the class that has the function, and the edits.
    """

    def __init__(
        self, owner: type, name: str, edits: tuple[Edit, ...], only_eval: bool, state: str
    ) -> None:
        self.owner, self.name, self.edits, self.only_eval = owner, name, edits, only_eval
        self.state = state
        self.original = getattr(owner, name)
        self.function = _rewritten(owner, name, edits)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not replacing() or (self.only_eval and module.training):
            return self.original(module, *args, **kwargs)
        if not _unchanged(module, self.state):
            return self.original(module, *args, **kwargs)
        return self.function(module, *args, **kwargs)

    def __reduce__(self) -> Any:
        return Rewritten, (self.owner, self.name, self.edits, self.only_eval, self.state)


@torch.compiler.assume_constant_result
def _unchanged(module: nn.Module, state: str) -> bool:
    """Whether a module still is what was read and compared: settings, hooks, other experts."""
    return moe_find.described(module) == state


class MixtureOfExperts(Preparer):
    """A loop over experts, modules in a container or slices of stacked parameters."""

    name = "mixture of experts"

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._chosen: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()

    def find(self, module: nn.Module) -> bool:
        held = moe_find.containers(module)
        stacked = not held and len(moe_find.stacks(module)) > 0
        if not held and not stacked:
            return False
        return bool(_loops(_class(module), frozenset(held)))

    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        if calls is not None and module not in calls:
            return "the example never reaches it: give example inputs that run it"
        functions = {
            name for name, _ in _loops(_class(module), frozenset(moe_find.containers(module)))
        }
        if functions & set(vars(module)):
            return "a function of it was replaced on the instance already: undo that first"
        if any(moe_find.hooked(child) for child in module.children()):
            return (
                "an expert, or another module in it, has hooks, which a single call would not run"
            )
        if _elsewhere(module):
            return (
                "its config sends it to an implementation without a loop, which is one graph "
                "already: there is nothing to prepare"
            )
        key = self.signature(module)
        if key not in self._plans or not self._fits(module, self._plans[key]):
            try:
                with torch.random.fork_rng(), torch.inference_mode(False):
                    torch.manual_seed(0)
                    self._plans[key] = self._plan(module, (calls or {}).get(module))
            except Refused as error:
                return str(error)
            except Exception as error:
                return f"it could not be read: {type(error).__name__}: {error}"
        self._chosen[module] = self._plans[key]
        return None

    def signature(self, module: nn.Module) -> Hashable:
        """Modules that print alike, too, where activations are seen, and have equal settings."""
        settings = tuple(
            (name, value)
            for part in module.modules()
            for name, value in sorted(vars(part).items())
            if isinstance(value, (bool, int, float, str)) and name != "training"
        )
        return super().signature(module), str(module), settings

    def _fits(self, module: nn.Module, plan: Plan) -> bool:
        """Whether a plan for another module that looks the same is one for this."""
        self._chosen[module] = plan
        case = plan.form.case(plan.cases[0], next(module.parameters()).device)
        return self._wrong(module, [case]) is None

    def _wrong(self, module: nn.Module, cases: list[Case]) -> str | None:
        """Where the chosen plan differs from the original; None if it does not."""
        try:
            return disagreement(self, module, cases)[1]
        except Refused:
            raise
        except Exception as error:
            return f"it fails with {type(error).__name__}: {error}"

    def cases(self, module: nn.Module, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        plan = self._chosen[module]
        names = plan.cases if thorough else plan.cases[:1]
        device = next(module.parameters()).device
        for name in names:
            yield plan.form.case(name, device)

    def forward(self) -> Callable[..., Any]:
        raise TypeError("each module has a replacement of its own: see swap()")

    def result(self, output: Any) -> list[Tensor]:
        """Everything that is returned, the router's logits and losses too."""
        return [
            leaf
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]

    def swap(self, module: nn.Module) -> Callable[[], None]:
        return _swap(module, self._chosen[module])

    def _plan(self, module: nn.Module, seen: Any) -> Plan:
        twin = copy.deepcopy(module).float().eval()
        held = moe_find.containers(twin)
        loops = _loops(_class(module), frozenset(held))
        reasons: list[str] = []
        readable: list[tuple[Experts | None, int]] = []
        raised = "nothing: there were none"
        for path, keys in held.items():
            try:
                readable.append(moe_find.from_modules(twin, path, keys))
            except Refused as error:
                reasons.append(str(error))
        if not held:
            readable.append((None, 0))
        for known, features in readable:
            for form in forms(twin, seen, features):
                why = _why_not(twin, form, "random tokens")
                if why is not None:
                    raised = why
                    continue
                try:
                    return self._with(module, twin, loops, known, form)
                except Refused as error:
                    reasons.append(str(error))
        if reasons:
            raise Refused(reasons[0])
        raise Refused(
            "it takes none of the inputs that were tried: give example inputs "
            f"(the last ones raised {raised})"
        )

    def _with(
        self,
        module: nn.Module,
        twin: nn.Module,
        loops: tuple[tuple[str, Place], ...],
        known: Experts | None,
        form: Form,
    ) -> Plan:
        experts = known
        if experts is None:
            if form.run is None:
                raise Refused(
                    "its weights are stacked, and its forward does not take tokens, numbers of "
                    "experts and weights: what one expert computes cannot be told apart"
                )
            experts = moe_find.from_stack(
                twin, functools.partial(form.run, twin), form.choices, form.features
            )
        only_eval = self._random(twin, experts, form)
        edits: dict[tuple[str, Place], Edit] = {}
        reasons: list[str] = []
        for training in (False,) if only_eval else (False, True):
            twin.train(training)
            for function, place in loops:
                if (function, place) in edits:
                    continue
                try:
                    found = _search(twin, function, place, experts, form)
                    found = _typed(module, function, place, form, found)
                except Refused as error:
                    reasons.append(str(error))
                    continue
                edits |= self._first(
                    module, twin, form, experts, edits, function, place, found, training
                )
        twin.eval()
        if not edits:
            raise Refused(
                reasons[0]
                if reasons
                else "what its loop computes differs from a mixture of experts"
            )
        made = tuple(edits.values())
        if not only_eval and _why_not(twin, form, "training") is None:
            # Something random in the loop itself, such as whole tokens dropped.
            self._chosen[module] = Plan(made, form, experts, False, ())
            case = form.case("training", next(module.parameters()).device)
            only_eval = self._wrong(module, [case]) is not None
        return Plan(made, form, experts, only_eval, _comparable(twin, form, not only_eval))

    def _first(
        self,
        module: nn.Module,
        twin: nn.Module,
        form: Form,
        experts: Experts,
        edits: Mapping[tuple[str, Place], Edit],
        function: str,
        place: Place,
        found: list[Match],
        training: bool,
    ) -> dict[tuple[str, Place], Edit]:
        """The first reading that agrees with the original, gradients too."""
        reason = None
        for match in found[:_MOST_MATCHES]:
            edit = Edit(
                function, place, match.index - 1, match.result, dispatch(experts, match.roles)
            )
            plan = Plan((*edits.values(), edit), form, experts, False, ())
            self._chosen[module] = plan
            device = next(module.parameters()).device
            taken = _comparable(twin, form, False)
            cases = [form.case(name, device) for name in (taken if not training else taken[:1])]
            cases = [dataclasses.replace(case, training=training) for case in cases]
            wrong = self._wrong(module, cases)
            if wrong is None:
                return {(function, place): edit}
            reason = reason or wrong
        if reason is not None:
            raise Refused(f"what stands for its loop is not the same: {reason}")
        return {}

    def _random(self, twin: nn.Module, experts: Experts, form: Form) -> bool:
        if experts.path is None:
            return False
        return moe_find.random_in_training(experts.modules(twin)[0], form.features)


def _class(module: nn.Module) -> Any:
    return type(module)


def _swap(module: nn.Module, plan: Plan) -> Callable[[], None]:
    undo: list[Callable[[], None]] = []
    state = moe_find.described(module)
    for name in dict.fromkeys(edit.function for edit in plan.edits):
        edits = tuple(edit for edit in plan.edits if edit.function == name)
        made = Rewritten(type(module), name, edits, plan.only_eval, state)
        undo.append(_replace(module, name, made))

    def back() -> None:
        for one in undo:
            one()

    return back


def _replace(module: nn.Module, name: str, function: Rewritten) -> Callable[[], None]:
    replacement = functools.partial(function, module)
    setattr(module, name, replacement)

    def undo() -> None:
        if vars(module).get(name) is replacement:
            delattr(module, name)

    return undo


def _why_not(twin: nn.Module, form: Form, name: str) -> str | None:
    """Why the original cannot be compared on these inputs, or None if it can."""
    case = form.case(name, next(twin.parameters()).device)
    was = twin.training
    twin.train(case.training)
    output, error = attempt(lambda: twin(*case.args, **case.kwargs))
    twin.train(was)
    if error is not None:
        return error
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if name == "large tokens" and not all(bool(leaf.isfinite().all()) for leaf in leaves):
        return "its result overflows"
    return None


def _comparable(twin: nn.Module, form: Form, training: bool) -> tuple[str, ...]:
    """The cases that the original can be compared on."""
    return tuple(name for name in form.names(training) if _why_not(twin, form, name) is None)


def _search(
    twin: nn.Module, function: str, place: Place, experts: Experts, form: Form
) -> list[Match]:
    """Runs a function with a probe around one loop, and reads what it saw."""
    source = _source(_class(twin), function)
    seen = _observed(twin, source, function, place, form, torch.float32)
    if place.index not in seen:
        return []
    assigned = {}
    for index in seen:
        if index > place.index:
            outside = source.changes(place, index - 1)
            if outside is not None and index == place.index + 1:
                raise Refused(f"its loop also changes {outside}")
            assigned[index] = source.assigns(place, index - 1) if outside is None else set()
    with torch.no_grad():
        found = matches(twin, experts, seen, assigned)
    if not found:
        raise Refused(
            "what its loop gives differs from each token through its experts, weighted: a capacity "
            "in the loop, a norm or a factor of its own"
        )
    return found


def _observed(
    twin: nn.Module,
    source: Source,
    function: str,
    place: Place,
    form: Form,
    dtype: torch.dtype,
) -> dict[int, dict[str, Any]]:
    """The variables of a function, by the number of statements of a block that had run."""
    seen: dict[int, dict[str, Any]] = {}

    def probe(index: int, variables: Mapping[str, Any]) -> None:
        if index not in seen:
            seen[index] = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in variables.items()
            }

    made = source.compiled(source.probed(place), {PROBE: probe})
    setattr(twin, function, functools.partial(made, twin))
    try:
        case = form.case("random tokens", next(twin.parameters()).device)
        args = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, case.args
        )
        with torch.no_grad():
            twin(*args, **case.kwargs)
    finally:
        delattr(twin, function)
    return seen


def _typed(
    module: nn.Module, function: str, place: Place, form: Form, found: list[Match]
) -> list[Match]:
    """The readings, with the dtype that their results have in the module's own precision."""
    dtype = next(module.parameters()).dtype
    if dtype is torch.float32 or not found:
        return found
    twin = copy.deepcopy(module)
    source = _source(_class(twin), function)
    seen = _observed(twin, source, function, place, form, dtype)
    if place.index not in seen:
        return found

    def typed(match: Match) -> Match:
        roles, before = match.roles, seen[place.index]
        made = seen[match.index][match.result].dtype
        if roles.adds or roles.gates is None or made == before[roles.x].dtype:
            return match
        return dataclasses.replace(match, roles=dataclasses.replace(roles, dtype_of="gates"))

    return [typed(match) for match in found]


@functools.cache
def _source(owner: Any, name: str) -> Source:
    return Source(getattr(owner, name))


def _rewritten(owner: type, name: str, edits: tuple[Edit, ...]) -> Callable[..., Any]:
    source = _source(owner, name)
    statements: dict[Place, tuple[int, str]] = {}
    given: dict[str, Any] = {}
    for number, edit in enumerate(edits):
        call, roles = f"{CALL}{number}", edit.dispatch.roles
        operands = [source.parameters[0], roles.x, roles.ids, str(roles.gates)]
        if roles.adds and not source.zeros(edit.place, edit.result):
            operands.append(edit.result)
        given[call] = edit.dispatch
        statements[edit.place] = (edit.index, f"{edit.result} = {call}({', '.join(operands)})")
    return source.compiled(source.replaced(statements), given)


@functools.cache
def _loops(owner: Any, names: frozenset[str]) -> tuple[tuple[str, Place], ...]:
    """The loops over experts in a class's forward and in the methods that it calls."""
    found: list[tuple[str, Place]] = []
    pending, known = ["forward"], set()
    while pending:
        name = pending.pop(0)
        known.add(name)
        if not inspect.isfunction(getattr(owner, name, None)):
            continue
        try:
            source = _source(owner, name)
        except Refused:
            continue
        found += [(name, place) for place in source.places(set(names) or None)]
        called = _methods(source.tree, source.parameters)
        pending += [other for other in called if other not in known and other not in pending]
    return tuple(found)


def _methods(tree: ast.FunctionDef, parameters: list[str]) -> Iterator[str]:
    for item in ast.walk(tree):
        if (
            isinstance(item, ast.Call)
            and isinstance(item.func, ast.Attribute)
            and isinstance(item.func.value, ast.Name)
            and item.func.value.id in parameters[:1]
        ):
            yield item.func.attr


def _elsewhere(module: nn.Module) -> bool:
    """Whether a decorator of Hugging Face's sends the module to an implementation of its own."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    wrapped = hasattr(type(module).forward, "__wrapped__")
    return wrapped and isinstance(chosen, str) and chosen != "eager"
