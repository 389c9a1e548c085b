"""A function that Dynamo cannot follow, rebuilt from its own source so that it computes the same and can be followed.

`"x" in locals()` asks whether a name is bound: the names in question start as `...`, a `del` of one makes it `...`
again, and the question becomes `x is not ...`. `torch.cuda.synchronize()` and `torch.cuda.empty_cache()` change no
value and are left out; inside a loop they would make Dynamo give up the whole function. What
`torch.cuda.is_bf16_supported()` answers is a fact of the machine, and stands there as a constant.
`object.__getattribute__(x, "k")` of a dictionary class first looks into `x.__dict__`, which Dynamo can read.
Where stochastic depth takes `int` and `max` of a batch that may be a symbol, their symbolic forms stand, except in
Dynamo: it follows the plain ones, and that of torch 2.11 breaks the graph at a symbolic form of numbers.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType

import torch

_HINTS = {"torch.cuda.synchronize", "torch.cuda.empty_cache"}
_CAPABILITY = "torch.cuda.is_bf16_supported"
_SYMBOLIC = {"int": "torch.sym_int", "max": "torch.sym_max"}


def needs_rebuilding(function: FunctionType) -> bool:
    told_by = {"locals", *(name.rpartition(".")[2] for name in (*_HINTS, _CAPABILITY))}
    return not told_by.isdisjoint(function.__code__.co_names)


def shares_out_a_batch(function: FunctionType) -> bool:
    """Whether a method counts the items of a batch that training would keep, which is no number while tracing."""
    counts = any(name.startswith("sample_subset_size") for name in function.__code__.co_varnames)
    return counts and "sample_drop_ratio" in function.__code__.co_names


def reads_around_getattr(function: FunctionType) -> bool:
    """Whether a method asks `object` for an attribute, as dictionaries with attribute access do for their own state."""
    return "__getattribute__" in function.__code__.co_names


def rebuilt(function: FunctionType) -> FunctionType | None:
    """The function in a traceable form; None where it cannot be given one.

    That is where `locals()` is asked for more than whether a name is bound, and where the source means something else
    outside its class or closure.
    """
    if set(function.__code__.co_freevars) - {"__class__"}:  # which the mere word `super` brings along
        return None
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:
        return None
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    names = {node.left.value for node in ast.walk(definition) if _asks(node)}  # type: ignore[attr-defined]
    definition.decorator_list = []
    definition = _Rebind(names, shares_out_a_batch(function)).visit(definition)
    if any(_is_locals(node) or _is_private(node) or _wants_class(node) for node in ast.walk(definition)):
        return None
    _forget_defaults(definition.args)
    parameters = {arg.arg for arg in ast.walk(definition.args) if isinstance(arg, ast.arg)}
    definition.body[:0] = [_unbound(name) for name in sorted(names - parameters)]
    ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)
    scope: dict[str, FunctionType] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, scope)
    made = scope[definition.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def _forget_defaults(arguments: ast.arguments) -> None:
    """Defaults may name things of the class body, and are objects of the original function anyway."""
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]


def _is_private(node: ast.AST) -> bool:
    """self.__name, which Python spells with the name of the class."""
    return isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__")


def _wants_class(node: ast.AST) -> bool:
    """`super()` or `__class__`, which mean the class whose body they stand in."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
        return not node.args
    return isinstance(node, ast.Name) and node.id == "__class__"


def _is_locals(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "locals"


def _asks(node: ast.AST) -> bool:
    """`"x" in locals()`, or `not in`."""
    return (
        isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Constant)
        and isinstance(node.left.value, str)
        and len(node.ops) == 1
        and isinstance(node.ops[0], (ast.In, ast.NotIn))
        and _is_locals(node.comparators[0])
    )


def _is_cuda_hint(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _HINTS


def _looks_past_getattr(node: ast.Call) -> bool:
    """`object.__getattribute__(x, "k")` on a variable."""
    return ast.unparse(node.func) == "object.__getattribute__" and [type(arg) for arg in node.args] == [
        ast.Name,
        ast.Constant,
    ]


def _instance_first(node: ast.Call) -> ast.expr:
    """`x.__dict__["k"]` where it is there; the call as it was, with its AttributeError, where it is not."""
    where, name = (ast.unparse(arg) for arg in node.args)
    text = f"{where}.__dict__[{name}] if {name} in {where}.__dict__ else {ast.unparse(node)}"
    return ast.parse(text, mode="eval").body


def _unbound(name: str) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], ast.Constant(...))


class _Rebind(ast.NodeTransformer):
    def __init__(self, names: set[str], symbolic: bool) -> None:
        self.names, self.symbolic = names, symbolic

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if not _asks(node):
            return self.generic_visit(node)
        bound = isinstance(node.ops[0], ast.In)
        name = ast.Name(node.left.value, ast.Load())  # type: ignore[attr-defined]
        return ast.Compare(name, [ast.IsNot() if bound else ast.Is()], [ast.Constant(...)])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) == _CAPABILITY and not node.args and not node.keywords:
            return ast.Constant(torch.cuda.is_bf16_supported())
        if ast.unparse(node.func) in _SYMBOLIC and self.symbolic:
            plain = ast.unparse(node.func)
            choice = f"({plain} if torch.compiler.is_dynamo_compiling() else {_SYMBOLIC[plain]})"
            node.func = ast.parse(choice, mode="eval").body
        if _looks_past_getattr(node):
            return ast.copy_location(_instance_first(node), node)
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if _is_cuda_hint(node.value) else self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> list[ast.stmt]:
        def unbinds(target: ast.expr) -> bool:
            return isinstance(target, ast.Name) and target.id in self.names

        kept: list[ast.expr] = [target for target in node.targets if not unbinds(target)]
        cleared: list[ast.stmt] = [_unbound(t.id) for t in node.targets if isinstance(t, ast.Name) and unbinds(t)]
        return ([ast.Delete(kept)] if kept else []) + cleared
