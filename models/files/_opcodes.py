"""Pickles read as data: an interpreter of their opcodes that calls nothing the file names.

Python's own unpickler imports what a file names and calls it. Here a name is a value; what may be
made of it is a table of the caller's functions, and everything else is refused or becomes an
`Inert`, which remembers what it was called with and does nothing. Memory grows with the file only:
no opcode allocates by a number that the file states.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

MARK = object()


class Refused(ValueError):
    """A pickle that asks for more than data."""


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names; nothing is imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """In place of an object of a class that is not known here: what would have been done to it."""

    name: str
    arguments: object = ()
    state: object = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def build(self, state: object) -> None:
        self.state = state


Makers = Mapping[Name, Callable[..., Any]]


def load(
    stream: BinaryIO,
    makers: Makers,
    *,
    strict: bool,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of one pickle.

    Args:
        stream: at the start of a pickle of any protocol; left behind its end.
        makers: what a call of a name, or an object of that class, becomes.
        strict: whether other names are refused; else they become `Inert`.
        persistent: what a reference to something outside of the pickle becomes.

    Returns:
        Strings, numbers, bytes, lists, tuples, dicts, what makers return, Name and Inert. Strings
        of Python 2 are decoded as latin-1, sets are lists.

    Raises:
        Refused: a name that is not in `makers`, in strict mode; an opcode that no data needs.
        ValueError: the pickle is damaged or ends early.
    """
    machine = _Machine(makers, strict, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode, argument)
    except Refused:
        raise
    except Exception as error:
        # Damage shows as any of a dozen classes, in genops and in what is built.
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error
    raise ValueError("damaged pickle (no end)")


class _Machine:
    def __init__(
        self, makers: Makers, strict: bool, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.makers, self.strict, self.persistent = makers, strict, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name in _PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in ("GLOBAL", "INST"):
            found = self.named(*argument.split(" ", 1))
            if name == "INST":
                found = self.made(found, tuple(self.marked()))
            self.stack.append(found)
        elif name == "PERSID":
            self.stack.append(self.outside(argument))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the opcode {name}, which no data needs")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("a mark in place of a value")
        return value

    def marked(self) -> list[Any]:
        """Everything behind the last mark, which is taken away with it."""
        position = len(self.stack) - 1
        while self.stack[position] is not MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def outside(self, reference: Any) -> Any:
        if self.persistent is None:
            raise Refused("a reference to something outside of the file")
        return self.persistent(reference)

    def named(self, module: str, name: str) -> Name:
        """A name, which is refused where none but those of the table may stand."""
        found = Name(module, name)
        if self.strict and found not in self.makers:
            raise Refused(f"the name {found}, which is none of data")
        return found

    def made(self, function: Any, arguments: Any) -> Any:
        """What a call is replaced by."""
        if isinstance(function, Name) and function in self.makers:
            return self.makers[function](*arguments)
        if self.strict:
            raise Refused("a call of an object")
        return Inert(str(function) if isinstance(function, Name) else "an object", arguments)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(self.made(function, arguments))

    def call_with_names(self) -> None:
        names = self.pop()
        if names:
            raise Refused("a call with named arguments")
        self.call()

    def call_marked(self) -> None:
        function, *arguments = self.marked()
        self.stack.append(self.made(function, tuple(arguments)))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        self.stack.append(self.named(module, name))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if hasattr(target, "build"):
            target.build(state)
        elif not isinstance(target, dict):  # what hangs on a dictionary is not among its items
            raise ValueError(f"a state for a {type(target).__name__}")

    def extend(self) -> None:
        values, target = self.marked(), self.stack[-1]
        _elements(target).extend(values)

    def append(self) -> None:
        value, target = self.pop(), self.stack[-1]
        _elements(target).append(value)

    def update(self) -> None:
        values, target = self.marked(), self.stack[-1]
        _items(target).update(zip(values[::2], values[1::2], strict=True))

    def set_item(self) -> None:
        value, key, target = self.pop(), self.pop(), self.stack[-1]
        _items(target)[key] = value

    def dictionary(self) -> None:
        values = self.marked()
        self.stack.append(dict(zip(values[::2], values[1::2], strict=True)))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))


def _elements(target: Any) -> list[Any]:
    if isinstance(target, Inert):
        return target.elements
    if not isinstance(target, list):
        raise ValueError(f"elements for a {type(target).__name__}")
    return target


def _items(target: Any) -> dict[Any, Any]:
    if isinstance(target, Inert):
        return target.items
    if not isinstance(target, dict):
        raise ValueError(f"items for a {type(target).__name__}")
    return target


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "MARK": lambda: MARK,
}
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_ACTIONS: dict[str, Callable[[_Machine], Any]] = {
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine.marked(),
    "DUP": lambda machine: machine.stack.append(machine.stack[-1]),
    "LIST": lambda machine: machine.stack.append(machine.marked()),
    "FROZENSET": lambda machine: machine.stack.append(machine.marked()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.marked())),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "DICT": _Machine.dictionary,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.update,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "OBJ": _Machine.call_marked,
    "STACK_GLOBAL": _Machine.stack_global,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine: machine.stack.append(machine.outside(machine.pop())),
}
