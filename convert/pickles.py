"""Reads pickles as data: imports and calls in a pickle are recorded and never executed."""

import pickletools
import re
from typing import BinaryIO

# Classes and functions that occur in checkpoints: in the weights, or in the settings and logs beside them.
_ALLOWED_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter|defaultdict|deque)"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|complex|getattr)"
    r"|_codecs\.encode"
    r"|numpy\.(ndarray|dtype)|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(\w+Storage|\w*Tensor|Size|device|per_\w+_affine\w*|bool|(bfloat|float|u?int|q?u?int|complex)\d\w*)"
    r"|torch\.storage\.\w+Storage|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.\w+|torch\.serialization\._get_layout"
    r"|yacs\.config\.CfgNode|mmengine\.logging\.history_buffer\.HistoryBuffer"
)
_MAX_OPCODES = 1_000_000  # per pickle; the training checkpoint of a large model has about 100,000

# Opcodes whose argument is the value.
_VALUE_OPCODES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANT_OPCODES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLE_OPCODES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # number of items


class RefusedName(Exception):
    """A pickle imports a name that is not allowed."""


class Call:
    """A recorded call that would make an object: the function's name, the arguments, and the state set afterwards."""

    def __init__(self, function: str, arguments: tuple):
        self.function, self.arguments, self.state = function, arguments, None

    def __repr__(self) -> str:
        return f"<{self.function}>"


class Name(str):
    """The name of a class or function that a pickle imports."""


def read_pickle(file: BinaryIO) -> tuple[object, list[Call]]:
    """Reads the pickle at the file's position, and moves the position behind it. Returns its value and persistent ids.

    The value consists of builtin types, with an `OrderedDict` as a dict. Every other object is a `Call`. Items that are
    added to a `Call` are dropped. A dict key that is not a string becomes a `Call` too: hashing it could take forever.

    Raises:
        RefusedName: if the pickle imports a name that is not allowed.
        Exception: of almost any type, if the pickle is damaged.
    """
    stack, marks, memo, persistent_ids = [], [], {}, []

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> list:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise ValueError("the stack of a pickle is empty")
        items = stack[-count:]
        del stack[-count:]
        return items

    def record_name(name: str) -> Name:
        if not _ALLOWED_NAMES.fullmatch(name):
            raise RefusedName(name)
        return Name(name)

    def record_call(function: Name, arguments: tuple):
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("a pickle calls an object that is not a function")
        return {} if function == "collections.OrderedDict" and not arguments else Call(function, arguments)

    def add_items(target, items: list) -> None:
        if isinstance(target, dict):
            keys = (key if type(key) is str else Call("a key that is not a string", (key,)) for key in items[::2])
            target.update(zip(keys, items[1::2], strict=True))

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == _MAX_OPCODES:
            raise ValueError(f"a pickle has more than {_MAX_OPCODES:,} opcodes")
        name = opcode.name
        if name in _VALUE_OPCODES:
            stack.append(argument)
        elif name in _CONSTANT_OPCODES:
            stack.append(_CONSTANT_OPCODES[name])
        elif name in _TUPLE_OPCODES:
            stack.append(tuple(pop(_TUPLE_OPCODES[name])))
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
                    stack.append(tuple(pop_to_mark()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(Call("set", ()))
                case "LIST":
                    stack.append(pop_to_mark())
                case "DICT":
                    items = pop_to_mark()
                    stack.append({})
                    add_items(stack[-1], items)
                case "FROZENSET":
                    stack.append(Call("frozenset", tuple(pop_to_mark())))
                case "APPEND" | "APPENDS":
                    items = pop(1) if name == "APPEND" else pop_to_mark()
                    if isinstance(stack[-1], list):
                        stack[-1].extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop(2) if name == "SETITEM" else pop_to_mark()
                    add_items(stack[-1], items)
                case "ADDITEMS" | "POP_MARK":
                    pop_to_mark()
                case "POP":
                    pop(1)
                case "DUP":
                    stack.append(stack[-1])
                case "GLOBAL":
                    stack.append(record_name(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    stack.append(record_name(".".join(pop(2))))
                case "REDUCE" | "NEWOBJ":
                    stack.append(record_call(*pop(2)))
                case "NEWOBJ_EX":
                    stack.append(record_call(*pop(3)[:2]))
                case "BUILD":
                    (state,) = pop(1)
                    if isinstance(stack[-1], Call):
                        stack[-1].state = state
                case "PERSID" | "BINPERSID":
                    persistent_ids.append(Call("a persistent id", (argument if name == "PERSID" else pop(1)[0],)))
                    stack.append(persistent_ids[-1])
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case _:
                    raise ValueError(f"a pickle has the opcode {name}, which checkpoints do not use")
    return pop(1)[0], persistent_ids
