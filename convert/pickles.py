"""Reads pickles as data: what a pickle asks to be imported or called is noted, and nothing is imported or called."""

import pickletools
import re
from typing import BinaryIO

# Names in checkpoints that weights, or the settings and logs beside them, have need of.
_KNOWN_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter|defaultdict|deque)"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|complex|getattr)"
    r"|_codecs\.encode"
    r"|numpy\.(ndarray|dtype)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(\w+Storage|\w*Tensor|Size|device|per_\w+_affine\w*|bool|(bfloat|float|u?int|q?u?int|complex)\d\w*)"
    r"|torch\.storage\.\w+Storage|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.\w+|torch\.serialization\._get_layout"
    r"|yacs\.config\.CfgNode|mmengine\.logging\.history_buffer\.HistoryBuffer"
)
_MOST_OPERATIONS = 1_000_000  # in one pickle; a large model's, saved during training, has about 100,000

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedName(Exception):
    """A name that a pickle asks for and that is not among those that weights have need of."""


class Call:
    """An object that a pickle would make by a call: the function's name, its arguments, and the state given to it."""

    def __init__(self, function: str, arguments: tuple):
        self.function, self.arguments, self.state = function, arguments, None

    def __repr__(self) -> str:
        return f"<{self.function}>"


class Name(str):
    """A class or function that a pickle names."""


def read_pickle(file: BinaryIO) -> tuple[object, list[Call]]:
    """The value of the pickle at the file's position, and all its persistent ids; the position is behind it afterwards.

    Builtin values are as they are, and an `OrderedDict` is a dict. All else is a `Call`, whose items, if it has any,
    are left out; so is a key of a dict that is no string, since hashing it can take any time.

    Raises:
        RefusedName: where a name is not known.
        Exception: almost any other where the pickle is damaged.
    """
    stack, marks, memo, persistent = [], [], {}, []

    def above_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> list:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise ValueError("a pickle's stack is empty")
        items = stack[-count:]
        del stack[-count:]
        return items

    def named(name: str) -> Name:
        if not _KNOWN_NAMES.fullmatch(name):
            raise RefusedName(name)
        return Name(name)

    def call(function: Name, arguments: tuple):
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("a pickle calls something that is no function")
        return {} if function == "collections.OrderedDict" and not arguments else Call(function, arguments)

    def add_items(target, items: list) -> None:
        if isinstance(target, dict):
            keys = (key if type(key) is str else Call("a key that is no string", (key,)) for key in items[::2])
            target.update(zip(keys, items[1::2], strict=True))

    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if number == _MOST_OPERATIONS:
            raise ValueError(f"a pickle of more than {_MOST_OPERATIONS:,} operations")
        name = operation.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(pop(_TUPLES[name])))
        else:
            match name:
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(above_mark()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(Call("set", ()))
                case "LIST":
                    stack.append(above_mark())
                case "DICT":
                    items = above_mark()
                    stack.append({})
                    add_items(stack[-1], items)
                case "FROZENSET":
                    stack.append(Call("frozenset", tuple(above_mark())))
                case "APPEND" | "APPENDS":
                    items = pop(1) if name == "APPEND" else above_mark()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop(2) if name == "SETITEM" else above_mark()
                    add_items(stack[-1], items)
                case "ADDITEMS" | "POP_MARK":
                    above_mark()
                case "POP":
                    pop(1)
                case "DUP":
                    stack.append(stack[-1])
                case "GLOBAL":
                    stack.append(named(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    stack.append(named(".".join(pop(2))))
                case "REDUCE" | "NEWOBJ":
                    stack.append(call(*pop(2)))
                case "NEWOBJ_EX":
                    stack.append(call(*pop(3)[:2]))
                case "BUILD":
                    (state,) = pop(1)
                    if isinstance(stack[-1], Call):
                        stack[-1].state = state
                case "PERSID" | "BINPERSID":
                    persistent.append(Call("a persistent id", (argument if name == "PERSID" else pop(1)[0],)))
                    stack.append(persistent[-1])
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case _:
                    raise ValueError(f"the operation {name} in a pickle")
    return pop(1)[0], persistent
