"""Config files and the command line become one validated dataclass.

    python train.py config/quick.py config/reduced_tied.py --weight_decay=2**-6 --wandb_log

A command keeps its defaults in a dataclass; the comment after each field is what `--help` prints. Config files are
plain Python assignments, applied in order; then `--key=value` (a boolean takes `--key` alone). Names that begin with
an underscore belong to the file that uses them.
"""

import ast
import dataclasses
import difflib
import inspect
import operator
import os
import sys
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
WORDS = {"none": None, "true": True, "false": False}


def parse(schema, argv, positional=None):
    """An instance of the dataclass `schema` from command-line arguments; see `read` for what they may be."""
    return schema(**read(schema, argv, positional=positional))


def read(schema, argv, base=None, positional=None, usage=None):
    """name -> value of the fields of the dataclass `schema` that command-line arguments set.

    base: values that come before those of the files (a stored run's configuration, say).
    positional: the name of the field that takes the arguments without `--`; None: they are config files.
    usage: what `--help` says first; None: the docstring of schema's module.
    Raises ValueError for a name that schema does not have, a value of another type, or an unreadable file, naming the
    field and where it was set. Prints the fields and exits on `--help`.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(schema, usage))
        raise SystemExit(0)
    fields = field_types(schema)
    values = {}  # name -> (value, where it was set)
    for name, value in (base or {}).items():
        values[known(name, fields, "the stored configuration")] = (value, "the stored configuration")
    words = config_files(argv)
    if positional:
        values[positional] = (tuple(words), "the command line")
    for path in () if positional else words:
        for name, (value, where) in read_config_file(path).items():
            values[known(name, fields, where)] = (value, where)
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            known(name, fields, "the command line")
            if not equals and fields[name] is not bool:
                raise ValueError(f"--{name} needs a value: write --{name}=…")
            values[name] = (from_text(text, fields[name]) if equals else True, "the command line")
    return {name: coerce(name, value, fields[name], where) for name, (value, where) in values.items()}


def config_files(argv):
    """The arguments that are not options."""
    return [argument for argument in argv if not argument.startswith("--")]


def read_config_file(path):
    """name -> (value, 'path, line n') for each public name that a config file assigns. Raises ValueError."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(str(path), [f"config/{p.name}" for p in ROOT.glob("config/*.py")], n=1)
        hint = f"did you mean {near[0]}?" if near else "options are written --key=value"
        raise ValueError(f"cannot read the config file {path} ({error.strerror}); {hint}") from error
    namespace = {"__file__": str(path)}
    try:
        tree = ast.parse(source, filename=str(path))
        exec(compile(tree, str(path), "exec"), namespace)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    lines = {node.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_store(node)}
    return {
        name: (value, f"{path}, line {lines[name]}")
        for name, value in namespace.items()
        if name in lines and not name.startswith("_")
    }


def coerce(name, value, kind, where):
    """value as the annotated type `kind`. An int is a valid float, and a float without a fraction a valid int."""
    choices = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        (kind,) = [choice for choice in choices if choice is not types.NoneType]
        return coerce(name, value, kind, where)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(name, item, choices[0], where) for item in value)
    elif typing.get_origin(kind) is typing.Literal:
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(str, choices))}, not {value!r}{hint}")
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is int and isinstance(value, (int, float)) and value == value // 1:
        return int(value)
    elif kind is float and isinstance(value, (int, float)):
        return float(value)
    elif kind is str and isinstance(value, str):
        return value
    raise ValueError(f"{where}: {name} must be {type_name(kind)}, not {value!r} ({type(value).__name__})")


def field_types(schema):
    """name -> annotated type of each field of a dataclass, those of its bases included."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def type_name(kind):
    """The type as a user reads it: 'int', 'float or none', 'one of gelu, relu', 'a list of int'."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if choice is types.NoneType else type_name(choice) for choice in arguments)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {type_name(arguments[0])}"
    return kind.__name__


def describe(schema, usage=None):
    """Every field with its default and the comment that stands after it in the source of its dataclass."""
    comments = {}
    for cls in schema.__mro__[:-1]:  # a field that is declared again has the comment of the last
        for line in inspect.getsource(cls).splitlines():
            declaration, _, comment = line.partition("  # ")
            comments.setdefault(declaration.partition(":")[0].strip(), comment)
    usage = usage or inspect.getmodule(schema).__doc__ or ""
    rows = [
        f"  --{field.name}={field.default!r}\n        {comments[field.name]} [{type_name(kind)}]"
        for field, kind in zip(dataclasses.fields(schema), field_types(schema).values(), strict=True)
    ]
    return usage.strip() + "\n\nFields, with their defaults:\n" + "\n".join(rows)


def run(main, argv=None):
    """Run a command's main(argv) and exit. A user's mistake becomes one line on standard error and exit status 2.

    A user's mistake is a ValueError that this repository raised; one from within torch or numpy is a bug and keeps its
    traceback. FloatingPointError (training diverged) is one line and exit status 1.
    """
    try:
        sys.exit(main(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not source.is_relative_to(ROOT) or "site-packages" in source.parts:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, say) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def known(name, fields, where):
    """name, if it is among fields; raises ValueError, with the nearest of them, if not. where: what names it."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options"
        raise ValueError(f"{where}: unknown option {name!r}; {hint}")
    return name


def _is_store(node):
    return isinstance(node.ctx, ast.Store)


def from_text(text, kind):
    """The value that command-line text stands for, given the field's type; text itself where it is no literal."""
    alternatives = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if text.lower() == "none" and types.NoneType in alternatives:
        return None
    if any(choice is str or typing.get_origin(choice) is typing.Literal for choice in alternatives):
        return text
    for choice in alternatives:
        if typing.get_origin(choice) is tuple:
            return tuple(from_text(item.strip(), typing.get_args(choice)[0]) for item in text.split(",") if item)
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return _arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, KeyError, ArithmeticError):
        return text


def _arithmetic(node):
    """The value of an expression of numbers, such as 2**-5; KeyError or TypeError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return ARITHMETIC[type(node.op)](_arithmetic(node.operand))
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))
    raise TypeError
