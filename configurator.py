"""Config files and the command line become one validated dataclass.

    python train.py config/quick.py config/reduced_tied.py --weight_decay=2**-6 --wandb_log

A command keeps its defaults in a dataclass; the comment after each field is what `--help` prints, under the heading
that a comment line above the fields gives. Config files are plain Python, applied in order; then `--key=value` (a
boolean takes `--key` alone). Names that begin with an underscore belong to the file that uses them.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import sys
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMAND_LINE = "the command line"
FilePath = typing.NewType("FilePath", str)  # a field that names a file or a folder; ~ is the home folder
MAX_INT = 2**63  # what torch and numpy can take
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
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", FilePath: "a path"}


def parse(schema, argv, positional=None):
    """An instance of the dataclass `schema` from command-line arguments; see `read` for what they may be."""
    return schema(**read(schema, argv, positional=positional))


def read(schema, argv, base=None, positional=None, usage=None):
    """name -> value of the fields of the dataclass `schema` that command-line arguments set.

    base: values that come before those of the files (a stored run's configuration, say).
    positional: the name of the field that takes the arguments without `--`; None: they are config files.
    usage: what `--help` says first; None: the docstring of schema's module.
    Raises ValueError for a name that schema does not have, a value of another type, or an unreadable file, naming the
    field and where it was set. Prints the fields and exits on `--help`. Where schema has a class variable HINTS, name
    -> text, it says what to write in place of a name that others use.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(schema, usage))
        raise SystemExit(0)
    fields, hints = field_types(schema), getattr(schema, "HINTS", {})
    values = {}  # name -> (value, where it was set)
    for name, value in (base or {}).items():
        values[known(name, fields, "the stored configuration")] = (value, "the stored configuration")
    words = config_files(argv)
    if positional:
        values[positional] = (tuple(words), COMMAND_LINE)
    for path in () if positional else words:
        for name, (value, where) in read_config_file(path).items():
            values[known(name, fields, where, hints)] = (value, where)
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            known(name, fields, COMMAND_LINE, hints)
            if not equals and bool not in alternatives(fields[name]):
                raise ValueError(f"--{name} needs a value: write --{name}=…")
            values[name] = (from_text(text, fields[name]) if equals else True, COMMAND_LINE)
    return {name: coerce(name, value, fields[name], where) for name, (value, where) in values.items()}


def config_files(argv):
    """The arguments that are not options."""
    return [argument for argument in argv if not argument.startswith("--")]


def read_config_file(path, functions=()):
    """name -> (value, 'path, line n') for each public name that a config file brings into its namespace.

    However it does so: by assignment, `from … import *` or exec. Modules and functions do not count, but for the
    functions that are named. A file that is not in the working folder is looked for beside this one, too.
    Raises ValueError for one that cannot be read, naming the line of the mistake.
    """
    place = Path(path).expanduser()
    if not place.exists() and (ROOT / place).is_file():
        place = ROOT / place
    try:
        source = place.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the config file {path} ({error.strerror}): {_file_hint(path)}") from error
    namespace = {"__file__": str(place), "__name__": place.stem}
    try:
        tree = ast.parse(source, filename=str(path))  # from bytes: a declared encoding is Python's matter
        exec(compile(tree, str(path), "exec"), namespace)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None) or 1
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {reason}") from error
    lines = {node.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_store(node)}
    lines |= {node.name: node.lineno for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {
        name: (value, f"{path}, line {lines[name]}" if name in lines else str(path))
        for name, value in namespace.items()
        if not name.startswith("_")
        and (name in functions or not (callable(value) or isinstance(value, types.ModuleType)))
    }


def _file_hint(path):
    """What to do where a config file cannot be read."""
    if Path(path).is_dir():
        return f"it is a folder; a run in it is continued with --out_dir={path} --resume"
    others = {f"config/{p.name}" for p in ROOT.glob("config/*.py")} - {str(path)}
    near = difflib.get_close_matches(str(path), sorted(others), n=1)
    return f"did you mean {near[0]}?" if near else "config files come first, options are written --key=value"


def _is_store(node):
    return isinstance(node.ctx, ast.Store)


def known(name, fields, where, hints=types.MappingProxyType({})):
    """name, if it is among fields; raises ValueError, with a hint or the nearest of them, if not."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options"
        what = f"unknown option --{name}" if where == COMMAND_LINE else f"{where}: unknown option {name!r}"
        raise ValueError(f"{what}; {hints.get(name, hint)}")
    return name


def coerce(name, value, kind, where):
    """value as the annotated type `kind`. An int is a valid float, and a float without a fraction a valid int.

    where: what set it, for the ValueError that is raised for another type and for a number that is not finite.
    """

    def refuse(wanted, hint=""):
        field = f"--{name}" if where == COMMAND_LINE else f"{where}: {name}"
        raise ValueError(f"{field} must be {wanted}, got {value!r}{hint}")

    wanted = type_name(kind)
    if value is None and types.NoneType in alternatives(kind):
        return None
    kinds = [choice for choice in alternatives(kind) if choice is not types.NoneType]
    if len(kinds) > 1:
        for choice in kinds:
            with contextlib.suppress(ValueError):
                return coerce(name, value, choice, where)
        refuse(wanted)
    (kind,) = kinds
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(name, item, choices[0], where) for item in value)
    elif typing.get_origin(kind) is typing.Literal:
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        refuse(wanted, f"; did you mean {near[0]!r}?" if near else "")
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind in (int, float) and isinstance(value, (int, float)):
        try:
            number = float(value)
        except OverflowError:  # an int beyond the largest float
            number = math.inf
        if kind is float and math.isfinite(number):
            return number
        if kind is float or not abs(value) < MAX_INT:  # nan fails, too
            refuse("a finite number" if kind is float else f"{wanted} below 2**63")
        if value == value // 1:
            return int(value)
    elif kind is FilePath and isinstance(value, str):
        return os.path.expanduser(value)
    elif kind is str and isinstance(value, str):
        return value
    return refuse(wanted)


def require(config, positive="", not_negative=""):
    """Raise ValueError, naming the field, unless the named fields of a dataclass are in their range; None passes."""
    for names, is_right, wanted in (
        (positive, lambda value: 0 < value < math.inf, "positive"),
        (not_negative, lambda value: 0 <= value < math.inf, "zero or positive"),
    ):
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not is_right(value):
                raise ValueError(f"{name} must be {wanted}, got {value}")


def field_types(schema):
    """name -> annotated type of each field of a dataclass, those of its bases included."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def alternatives(kind):
    """The types of a union such as int | None; of another type itself alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def type_name(kind):
    """The type as a user reads it: 'a whole number', 'a number or none', 'one of gelu, relu'."""
    if len(alternatives(kind)) > 1:
        return " or ".join("none" if choice is types.NoneType else type_name(choice) for choice in alternatives(kind))
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is tuple:
        return f"a list, each {type_name(arguments[0])}"
    return TYPE_NAMES[kind]


def describe(schema, usage=None):
    """Every field with its default and the comment after it in the source of its dataclass, under its heading."""
    comments, headings = {}, {}
    for cls in reversed(schema.__mro__[:-1]):  # a field that is declared again has its last comment and heading
        heading = "options"
        for line in inspect.getsource(cls).splitlines():
            if match := re.fullmatch(r"    # (.+)", line):
                heading = match[1]
            elif match := re.match(r"    (\w+): .*?  # (.+)", line):
                comments[match[1]], headings[match[1]] = match[2], heading
    kinds, sections = field_types(schema), {}
    for field in dataclasses.fields(schema):
        row = f"  --{field.name}={field.default!r}\n        {comments[field.name]} [{type_name(kinds[field.name])}]"
        sections.setdefault(headings[field.name], []).append(row)
    usage = (usage or inspect.getmodule(schema).__doc__ or "").strip()
    return "\n\n".join([usage, *("\n".join([f"{heading}:", *rows]) for heading, rows in sections.items())])


def from_text(text, kind):
    """The value that command-line text stands for, given the field's type; text itself where it is no literal."""
    kinds = alternatives(kind)
    if text.lower() == "none" and types.NoneType in kinds:
        return None
    texts = (str, FilePath, types.NoneType)
    if all(choice in texts or typing.get_origin(choice) is typing.Literal for choice in kinds):
        return text
    for choice in kinds:
        if typing.get_origin(choice) is tuple:
            return tuple(from_text(item.strip(), typing.get_args(choice)[0]) for item in text.split(",") if item)
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return _arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, KeyError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return text


def _arithmetic(node):
    """The value of an expression of numbers, such as 2**-5; KeyError or TypeError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return ARITHMETIC[type(node.op)](_arithmetic(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _arithmetic(node.left), _arithmetic(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 1024:  # 9**9**9 would take all memory
            raise OverflowError
        return ARITHMETIC[type(node.op)](left, right)
    raise TypeError


def run(main, argv=None):
    """Run a command's main(argv) and exit.

    A user's mistake, which is a ValueError that this repository raised, is one line on standard error and exit status
    2; so is what the system or a library refuses (a full disk, a number out of its range), with a hint to `--debug`,
    which shows the traceback. FloatingPointError (training diverged) is one line and exit status 1. Anything else is a
    bug, and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows its code, and loses nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main([argument for argument in argv if argument != "--debug"]))
    except FloatingPointError as error:
        _fail(error, str(error), 1, debug)
    except BrokenPipeError:  # the reader of our output (head, say) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, OverflowError, RecursionError, MemoryError) as error:
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        is_ours = isinstance(error, ValueError) and source.is_relative_to(ROOT) and "site-packages" not in source.parts
        text = str(error) if is_ours else f"{_reason(error)} (--debug shows where)"
        _fail(error, text, 2, debug)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says on a CPU, where it has no error of its own
            raise
        _fail(error, "there is not enough memory: make the model or batch_size smaller (--debug shows where)", 2, debug)
    except KeyboardInterrupt:
        sys.exit(130)


def _reason(error):
    """What a library's or the system's error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _fail(error, text, status, debug):
    if debug:
        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # it may go to a file on the disk that is full
        print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)
    sys.exit(status)
