"""What a module's forward does with its children, read from its source: which of them share an input, and which form
its feed-forward part has. Read once a class; a class without source, or of another form, simply has none.
"""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any, NamedTuple

from torch import nn


class Feedforward(NamedTuple):
    """The children of a feed-forward module. gate: None in the plain form."""

    gate: str | None
    up: str
    down: str
    activation: str
    dropout: str | None


@cache
def siblings(cls: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of children that `cls.forward` calls on one and the same local name, which nothing assigns in between."""
    function = forward_of(cls)
    if function is None:
        return ()
    calls: dict[str, list[tuple[int, str]]] = {}
    for node in ast.walk(function):
        child, argument = _child_call(node)
        if child is not None and argument is not None:
            calls.setdefault(argument, []).append((node.lineno, child))  # type: ignore[attr-defined]
    groups = []
    for name, found in calls.items():
        found.sort()
        children = [child for _, child in found]
        assigned = any(found[0][0] <= line < found[-1][0] for line in _assignments(function, name))
        if len(children) > 1 and len(set(children)) == len(children) and not assigned:
            groups.append(tuple(children))
    return tuple(groups)


@cache
def feedforward(cls: Any) -> Feedforward | None:
    """The form of `cls.forward` where it is a feed-forward part: `down(act(gate(x)) * up(x))` (Llama, Mistral, Qwen) or
    `dropout(down(act(up(x))))` in a step a line (GPT-2)."""
    function = forward_of(cls)
    if function is None:
        return None
    body = steps(function)
    return _gated(body) or _plain(body)


def _gated(body: list[ast.stmt]) -> Feedforward | None:
    """`out = self.down(self.act(self.gate(x)) * self.up(x)); return out`, or the same in one line."""
    value = _returned(body)
    down, inner = _called(value)
    if down is None or not isinstance(inner, ast.BinOp) or not isinstance(inner.op, ast.Mult):
        return None
    activation, gated = _called(inner.left)
    gate, x = _called(gated)
    up, other = _called(inner.right)
    if (
        None in (activation, gate, up)
        or not isinstance(x, ast.Name)
        or not isinstance(other, ast.Name)
        or x.id != other.id
    ):
        return None
    return Feedforward(gate, str(up), down, str(activation), None)


def _returned(body: list[ast.stmt]) -> ast.expr | None:
    if len(body) == 2 and isinstance(body[0], ast.Assign) and isinstance(body[1], ast.Return):
        target, back = body[0].targets[0], body[1].value
        same = isinstance(target, ast.Name) and isinstance(back, ast.Name) and target.id == back.id
        return body[0].value if same and len(body[0].targets) == 1 else None
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None


def _plain(body: list[ast.stmt]) -> Feedforward | None:
    """`h = self.up(h); h = self.act(h); h = self.down(h); h = self.dropout(h); return h`."""
    names: list[str] = []
    variable = None
    for node in body[:-1]:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            return None
        child, argument = _child_call(node.value)
        variable = variable or argument
        if child is None or argument != variable or node.targets[0].id != variable:
            return None
        names.append(child)
    last = body[-1]
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Name) or last.value.id != variable:
        return None
    return Feedforward(None, names[0], names[2], names[1], names[3]) if len(names) == 4 else None


def steps(function: ast.FunctionDef) -> list[ast.stmt]:
    """What it does, without its docstring."""
    return [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]


def forward_of(cls: type[nn.Module]) -> ast.FunctionDef | None:
    """The source of `cls.forward`; None where it has none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):  # built-in, made at run time, or a lambda inside an expression
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _called(node: ast.AST | None) -> tuple[str | None, ast.AST | None]:
    """(child, argument) of `self.child(argument)`; (None, None) for anything else."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None, None
    place = node.func
    if isinstance(place, ast.Attribute) and isinstance(place.value, ast.Name) and place.value.id == "self":
        return place.attr, node.args[0]
    return None, None


def _child_call(node: ast.AST) -> tuple[str | None, str | None]:
    """(child, name) of `self.child(name)`."""
    child, argument = _called(node)
    return (child, argument.id) if isinstance(argument, ast.Name) else (None, None)


def _assignments(function: ast.FunctionDef, name: str) -> list[int]:
    """The lines on which `name` is bound."""
    return [
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store | ast.Del)
    ]
