"""Values of short expressions that a policy wrote: numbers, + - * / and brackets. No eval()."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_MAX_CHARACTERS = 64
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str) -> Fraction:
    """The exact value.

    Raises:
        ValueError: anything but whole numbers, + - * / and brackets, or a division by zero.
    """
    if not 0 < len(expression) <= _MAX_CHARACTERS:
        raise ValueError(f"an expression has 1 to {_MAX_CHARACTERS} characters")
    if not set(expression) <= set("0123456789+-*/() "):
        raise ValueError(f"{expression!r}: only whole numbers, + - * / and brackets")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no expression") from None
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero") from None


def numbers_of(expression: str) -> list[int]:
    """The numbers an expression uses, in order."""
    parts = "".join(c if c.isdecimal() else " " for c in expression).split()
    return [int(part) for part in parts]


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("only whole numbers, + - * / and brackets")
