"""A function's source with its loop over experts replaced by one call, the rest the user's own.

The statements that only the loop needed (masks, counts, ``nonzero()``) go with it: whatever is left
computes something that is returned, stored or called for. Nothing is renamed and nothing moved.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sparse_compiler.passes.moe.site import Refused

# Names that the new source has for what it gets from here.
CALL, PROBE, VALUE = "__routed__", "__probe__", "__value__"
_ASKING = ("nonzero", "argwhere", "tolist", "numpy", "item", "masked_select")
_CHANGES = ("append", "extend", "insert", "pop", "remove", "clear", "update", "setdefault")


@dataclasses.dataclass(frozen=True)
class Place:
    """A statement that runs the experts.

    Attributes:
        block: path of the list of statements that it is in, from the function: alternately the
            position of a statement and the name of its field.
        index: its position there.
    """

    block: tuple[int | str, ...]
    index: int


class Source:
    """The source of a function, to be cut.

    Raises:
        Refused: it has none.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = inspect.unwrap(function)
        try:
            text = textwrap.dedent(inspect.getsource(self.function))
            (tree,) = ast.parse(text).body
        except (OSError, TypeError, SyntaxError, ValueError) as error:
            raise Refused(f"the source of its {function.__name__} is not there to read") from error
        if not isinstance(tree, ast.FunctionDef):
            raise Refused(f"its {function.__name__} is not a plain function")
        self.no_grad = any("no_grad" in ast.unparse(item) for item in tree.decorator_list)
        tree.decorator_list, tree.returns = [], None
        for argument in ast.walk(tree.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        tree.args.defaults, tree.args.kw_defaults = [], [None] * len(tree.args.kwonlyargs)
        self.tree = tree
        _name_returns(tree)
        self._owner = self.parameters[0]

    @property
    def parameters(self) -> list[str]:
        return [item.arg for item in [*self.tree.args.posonlyargs, *self.tree.args.args]]

    def places(self, names: set[str] | None) -> list[Place]:
        """The outermost statements that go over experts.

        Args:
            names: attributes of the module that hold them; ``""`` for the module itself; None for
                any loop.
        """
        if not _asks(self.tree):
            return []
        return list(_places(self.tree.body, (), names, self.parameters[0]))

    def block(self, path: tuple[int | str, ...]) -> list[ast.stmt]:
        return _block(self.tree, path)

    def compiled(
        self, tree: ast.FunctionDef, given: Mapping[str, Any], *, tidy: bool = True
    ) -> Callable[..., Any]:
        """The function of another tree, with the original's globals, defaults and closure.

        Args:
            tree: changed source.
            given: objects that it calls by these names.
            tidy: whether ``torch.no_grad`` is kept as the original has it.
        """
        old = self.function
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        cells |= {name: types.CellType(value) for name, value in given.items()}
        outer = _function(f"def __outer__({', '.join(cells)}): return {tree.name}")
        outer.body.insert(0, tree)
        module = ast.fix_missing_locations(ast.Module([outer], []))
        space: dict[str, Any] = {}
        exec(compile(module, f"<prepared {old.__qualname__}>", "exec"), space)
        inner = space["__outer__"](*(None for _ in cells)).__code__
        closure = tuple(cells[name] for name in inner.co_freevars)
        made = types.FunctionType(inner, old.__globals__, old.__name__, old.__defaults__, closure)
        made.__kwdefaults__ = old.__kwdefaults__
        return torch.no_grad()(made) if self.no_grad and tidy else made

    def probed(self, place: Place) -> ast.FunctionDef:
        """With a call of the probe in front of the place, and behind it and each that follows."""
        tree = copy.deepcopy(self.tree)
        block = _block(tree, place.block)
        new: list[ast.stmt] = list(block[: place.index])
        for index in range(place.index, len(block)):
            new.append(_parse(f"{PROBE}({index}, locals())"))
            new.append(block[index])
        if not isinstance(block[-1], (ast.Return, ast.Raise)):
            new.append(_parse(f"{PROBE}({len(block)}, locals())"))
        block[:] = new
        return tree

    def replaced(self, edits: Mapping[Place, tuple[int, str]]) -> ast.FunctionDef:
        """With new statements.

        Args:
            edits: for a place, the position in its block of the statement that is replaced, and
                what by.

        Raises:
            Refused: something behind the loop needs what else it makes.
        """
        tree = copy.deepcopy(self.tree)
        loops = {place: _block(tree, place.block)[place.index] for place in edits}
        for place, (index, text) in edits.items():
            _block(tree, place.block)[place.index] = ast.Pass()
            _block(tree, place.block)[index] = _parse(text)
        parameters = self.parameters
        live = _live_names(tree.body, parameters)
        tree.body = _Sweep(live, parameters).block(tree.body)
        for place, (_, text) in edits.items():
            loop = loops[place]
            later = [
                item
                for part in tree.body
                for item in ast.walk(part)
                if isinstance(item, ast.stmt) and item.lineno > (loop.end_lineno or 0)
            ]
            again = set().union(*map(_defined, later), _defined(_parse(text)))
            needed = sorted(_defined(loop) & set().union(*map(_reads, later)) - again)
            if needed:
                raise Refused(f"what the loop makes of {', '.join(needed)} is needed behind it")
        return tree

    def changes(self, place: Place, index: int) -> str | None:
        """What the statements from the place to ``index`` change outside of the function."""
        for statement in self.block(place.block)[place.index : index + 1]:
            found = _acts(statement, self._owner)
            if found:
                return found
        return None

    def assigns(self, place: Place, index: int) -> set[str]:
        """Names of which a new statement at ``index`` may set the value, in place of the old."""
        statement = self.block(place.block)[index]
        if index == place.index and isinstance(statement, ast.For):
            return _defined(statement)
        if not isinstance(statement, (ast.Assign, ast.AugAssign)):
            return set()
        (target, *others) = _targets(statement)
        return {target.id} if isinstance(target, ast.Name) and not others else set()

    def zeros(self, place: Place, name: str) -> bool:
        """Whether the last thing before the loop that sets ``name`` makes zeros, for it alone."""
        line = self.block(place.block)[place.index].lineno
        found = [item for item in ast.walk(self.tree) if isinstance(item, ast.stmt)]
        before = [item for item in found if _sets(item, name) and item.lineno < line]
        if len(before) != 1 or not isinstance(before[0], ast.Assign):
            return False
        called = getattr(before[0].value, "func", None)
        return getattr(called, "attr", "") in ("zeros", "zeros_like", "new_zeros")


def _function(text: str) -> ast.FunctionDef:
    statement = _parse(text)
    assert isinstance(statement, ast.FunctionDef)
    return statement


def _parse(text: str) -> ast.stmt:
    (statement,) = ast.parse(text).body
    return statement


def _sets(item: ast.stmt, name: str) -> bool:
    return isinstance(item, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.With)) and (
        name in _defined(item)
    )


def _name_returns(tree: ast.FunctionDef) -> None:
    """``return f(x)`` as two statements, so that the value can be looked at and replaced."""

    def visit(body: list[ast.stmt]) -> None:
        for statement in list(body):
            for child in _children(statement):
                visit(child)
            value = statement.value if isinstance(statement, ast.Return) else None
            if value is None or isinstance(value, (ast.Name, ast.Tuple, ast.Constant)):
                continue
            at = body.index(statement)
            assign = ast.Assign([ast.Name(VALUE, ast.Store())], value)
            body[at : at + 1] = [
                ast.copy_location(assign, statement),
                ast.copy_location(ast.Return(ast.Name(VALUE, ast.Load())), statement),
            ]

    visit(tree.body)
    ast.fix_missing_locations(tree)


def _children(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(statement, name, None)
        if isinstance(block, list) and not isinstance(
            statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        ):
            yield block


def _block(tree: ast.FunctionDef, path: tuple[int | str, ...]) -> list[ast.stmt]:
    body: Any = tree.body
    for index, name in zip(path[::2], path[1::2], strict=True):
        body = getattr(body[index], str(name))
    return body


def _places(
    body: list[ast.stmt], path: tuple[int | str, ...], names: set[str] | None, owner: str
) -> Iterator[Place]:
    for index, statement in enumerate(body):
        if isinstance(statement, (ast.If, ast.With)):
            for name in ("body", "orelse"):
                block = getattr(statement, name, [])
                yield from _places(block, (*path, index, name), names, owner)
        elif any(_goes_over(item, names, owner) for item in ast.walk(statement)):
            yield Place(path, index)


def _goes_over(item: ast.AST, names: set[str] | None, owner: str) -> bool:
    """Whether something is a loop over experts."""
    if isinstance(item, ast.For):
        return names is None or _mentions(item, names, owner)
    if not isinstance(item, (ast.ListComp, ast.GeneratorExp)) or names is None:
        return False
    # Each expert has tokens of its own: otherwise all run on all, and nothing cuts the graph.
    own = any(
        isinstance(call, ast.Call) and any(isinstance(arg, ast.Subscript) for arg in call.args)
        for call in ast.walk(item.elt)
    )
    zipped = any(
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "zip"
        for part in item.generators
        for call in ast.walk(part.iter)
    )
    return (own or zipped) and _mentions(item, names, owner)


def _mentions(item: ast.AST, names: set[str], owner: str) -> bool:
    for inner in ast.walk(item):
        value = getattr(inner, "value", None)
        own = isinstance(value, ast.Name) and value.id == owner
        if isinstance(inner, ast.Attribute) and inner.attr in names and own:
            return True
        if isinstance(inner, ast.Subscript) and "" in names and own:
            return True
    return False


def _asks(tree: ast.AST) -> bool:
    """Whether something asks the data what to do, as loops over layers do not."""
    for item in ast.walk(tree):
        if isinstance(item, ast.Call):
            name = getattr(item.func, "attr", getattr(item.func, "id", ""))
            if name in _ASKING or (name == "where" and len(item.args) == 1):
                return True
        if isinstance(item, ast.If) and any(
            isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("any", "sum", "numel")
            for call in ast.walk(item.test)
        ):
            return True
        if isinstance(item, ast.Subscript) and any(
            isinstance(part, ast.Compare) for part in ast.walk(item.slice)
        ):
            return True
        if isinstance(item, (ast.ListComp, ast.GeneratorExp)):
            return True
    return False


def _root(node: ast.AST) -> str | None:
    """The variable that an expression such as ``y[idx].data`` begins with."""
    while isinstance(node, (ast.Subscript, ast.Attribute, ast.Starred, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _changed(call: ast.Call) -> str | None:
    """The variable that a method call changes in place."""
    if not isinstance(call.func, ast.Attribute):
        return None
    name = call.func.attr
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _CHANGES
    return _root(call.func.value) if in_place else None


def _targets(statement: ast.AST) -> list[ast.AST]:
    if isinstance(statement, ast.Assign):
        return list(statement.targets)
    if isinstance(
        statement, (ast.AugAssign, ast.AnnAssign, ast.For, ast.NamedExpr, ast.comprehension)
    ):
        return [statement.target]
    if isinstance(statement, ast.withitem) and statement.optional_vars is not None:
        return [statement.optional_vars]
    return []


def _flat(target: ast.AST) -> Iterator[ast.AST]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _flat(item)
    else:
        yield target


def _defined(statement: ast.AST) -> set[str]:
    """The variables that a statement, with all in it, sets or changes."""
    found: set[str | None] = set()
    for item in ast.walk(statement):
        for target in _targets(item):
            found |= {_root(leaf) for leaf in _flat(target)}
        if isinstance(item, ast.Call):
            found.add(_changed(item))
    return {name for name in found if name is not None}


def _acts(statement: ast.AST, owner: str) -> str | None:
    """What a statement, with all in it, changes that outlives the function."""
    for item in ast.walk(statement):
        for target in _targets(item):
            for leaf in _flat(target):
                if _root(leaf) == owner:
                    return ast.unparse(leaf).split("[")[0]
        if isinstance(item, ast.Call) and _changed(item) == owner:
            return ast.unparse(item.func).split("[")[0].rpartition(".")[0]
        if isinstance(item, (ast.Return, ast.Raise, ast.Global, ast.Nonlocal, ast.Yield)):
            return f"the flow of the function ({type(item).__name__.lower()})"
    return None


def _reads(statement: ast.stmt) -> set[str]:
    """What a statement itself reads, without the statements in it."""
    if not list(_children(statement)):
        return _loads(statement)
    heads = [getattr(statement, name, None) for name in ("test", "iter")]
    return set().union(*map(_loads, [*heads, *getattr(statement, "items", ())]))


def _loads(node: ast.AST | None) -> set[str]:
    if node is None:
        return set()
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}


def _is_root(statement: ast.stmt, parameters: list[str]) -> bool:
    """Whether a statement matters for itself, not for the variables that it sets."""
    if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        leaves = [leaf for target in _targets(statement) for leaf in _flat(target)]
        if any(_root(leaf) in (None, parameters[0]) for leaf in leaves):
            return True
        # A router's call may draw random numbers or count; only reading is known to be harmless.
        return any(
            isinstance(item, ast.Call) and _root(item.func) == parameters[0]
            for item in ast.walk(statement)
        )
    if isinstance(statement, ast.Expr):
        if isinstance(statement.value, ast.Constant):
            return False
        changed = _changed(statement.value) if isinstance(statement.value, ast.Call) else None
        return changed is None or changed in parameters
    return not isinstance(statement, (ast.For, ast.If, ast.With, ast.Pass, ast.Continue, ast.Break))


def _live_names(body: list[ast.stmt], parameters: list[str]) -> set[str]:
    """Variables that something needs: what is returned, stored, or decides."""
    live: set[str] = set()
    while True:
        before = len(live)
        _mark(body, live, parameters)
        if len(live) == before:
            return live


def _mark(body: list[ast.stmt], live: set[str], parameters: list[str]) -> bool:
    """Adds the variables that live statements read; whether any statement lives."""
    alive = False
    for statement in body:
        blocks = list(_children(statement))
        if blocks:
            inside = [_mark(block, live, parameters) for block in blocks]
            if any(inside):
                alive = True
                for name in ("test", "iter"):
                    live |= _loads(getattr(statement, name, None))
                for item in getattr(statement, "items", ()):
                    live |= _loads(item)
        elif _is_root(statement, parameters) or _defined(statement) & live:
            alive = True
            live |= _loads(statement)
    return alive


class _Sweep:
    """Takes statements away that set nothing of these names."""

    def __init__(self, live: set[str], parameters: list[str]) -> None:
        self._live = live
        self._parameters = parameters

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return [item for item in map(self._statement, body) if item is not None]

    def _statement(self, statement: ast.stmt) -> ast.stmt | None:
        blocks = list(_children(statement))
        if blocks:
            kept = [self.block(block) for block in blocks]
            if not any(kept):
                return None
            for block, left in zip(blocks, kept, strict=True):
                block[:] = left
            if not statement.body:  # type: ignore[attr-defined]
                statement.body = [ast.Pass()]  # type: ignore[attr-defined]
            return statement
        if _is_root(statement, self._parameters) or _defined(statement) & self._live:
            return statement
        return statement if isinstance(statement, (ast.Continue, ast.Break)) else None
