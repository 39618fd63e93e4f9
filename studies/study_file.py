"""A study's file: its arms, their controls, its grid and its seeds (see README.md beside this file for an example)."""

import dataclasses
import itertools
import re
import shlex
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import configurator
from train_config import TrainConfig

OF_A_RUN = {"arm": "{arm}", "seed": "{seed}"}  # stay in a text until each run is planned
RESERVED = ("seed", "out_dir", "resume", "eval_only")  # fields of TrainConfig that the sweep sets for each run


@dataclass
class Study:
    """What a study's file sets.

    In the texts of arms and settings, {field} stands for the value of that field of TrainConfig at the study's size:
    "--n_embd={n_embd}*31//32" suits any size. There and in the grid, {arm} and {seed} stand for those of each run:
    branch_from="out/trunk/{arm}/seed{seed}/ckpt.pt". A `size` below is a dict: every field of TrainConfig -> its value
    as the size's files and the command line set it.
    """

    arms: dict  # name -> arguments of train.py, as typed: "config/reduced_tied.py --attn_scale=1"
    control: str | dict  # the arm that all others are compared with; or a dict: arm -> its own control
    grid: dict | Callable = field(default_factory=dict)  # field -> list of values; or a function, see points
    settings: str = ""  # arguments of train.py for all arms, after each arm's own
    seeds: tuple[int, ...] = (1, 2, 3)  # of the weights and of the data order
    tuning_seeds: tuple[int, ...] = ()  # of these the seeds with which each arm's best point is chosen, and no more
    equal_within: float | None = None  # the fraction of the control's loss within which two arms count as equal
    about: tuple[str, ...] = ()  # the options in which arms are meant to differ; none: all in which these ones do
    where: dict = field(default_factory=dict, init=False)  # field -> "FILE, line n", for error messages

    def arguments(self, arm, size):
        """The arguments of train.py that an arm has at a size, as a list: its own, then those of settings."""
        words = []
        for name, text in (("arms", self.arms[arm]), ("settings", self.settings)):
            try:
                words += shlex.split(text.format_map(size | OF_A_RUN))
            except (KeyError, IndexError, AttributeError) as error:
                raise ValueError(
                    f"{self.where[name]}: braces in {name} must hold a field of train.py, as {{n_embd}}, got {text!r}"
                ) from error
            except ValueError as error:  # an unmatched brace or quotation mark
                raise ValueError(f"{self.where[name]}: cannot read {text!r} in {name}: {error}") from error
        return words

    def points(self, size):
        """The grid's points at a size, in order: pairs (axes, options) of dicts, field -> value.

        The axes name a point; its runs take the options as well. A dict as the grid has one axis for each of its keys,
        and a point for each combination of their values. A function gets the size as an object with an attribute for
        each field of TrainConfig, and returns such a dict, or a list with a dict for each point: its first key is the
        axis, the others are options.
        Raises ValueError, naming the file and line of the grid.
        """
        if self.grid == {}:
            return [({}, {})]
        where = f"{self.where['grid']}: grid"
        found, n_axes = self._call_grid(size, where) if callable(self.grid) else self.grid, 1
        if isinstance(found, dict):
            n_axes, combinations = len(found), itertools.product(*found.values())
            found = [dict(zip(found, values, strict=True)) for values in combinations]
        fields = configurator.field_types(TrainConfig)
        for name in map(str, found[0]):
            configurator.known(name, fields, where)
            if name in RESERVED:
                raise ValueError(f"{where} must not have {name}, which the sweep sets for each run")
        points = []
        for values in found:
            items = [(name, configurator.coerce(name, value, fields[name], where)) for name, value in values.items()]
            axes, options = dict(items[:n_axes]), dict(items[n_axes:])
            if any(axes == other for other, _ in points):
                text = ", ".join(f"{name}={value}" for name, value in axes.items())
                raise ValueError(f"{where} must have each point once, got {text} twice")
            points.append((axes, options))
        return points

    def _call_grid(self, size, where):
        """What a grid that is a function returns, checked: a dict of lists, or dicts with the same keys."""
        size = types.SimpleNamespace(**size)
        try:
            found = self.grid(size)
        except Exception as error:
            if isinstance(error, AttributeError) and error.obj is size:
                configurator.known(error.name, vars(size), f"{where}(size)")  # raises, with the nearest field
            raise ValueError(f"{where}(size) raised {type(error).__name__}: {error}") from error
        if is_grid(found):
            return found
        is_list = isinstance(found, (list, tuple)) and found and all(isinstance(each, dict) and each for each in found)
        if not is_list:
            raise ValueError(
                f"{where}(size) must return a list of dicts such as [dict(n_embd=64, …), …], or a dict such as "
                f"{{'n_embd': [64, 128]}}, got {found!r}"
            )
        keys = list(dict.fromkeys(tuple(each) for each in found))
        if len(keys) > 1:
            first, second = (", ".join(map(str, names)) for names in keys[:2])
            raise ValueError(f"{where}(size) must return dicts of the same keys in one order, got {first} and {second}")
        return found


def is_dict(value, *kinds):
    """Whether a value is a dict, not empty, whose values are of these types."""
    return isinstance(value, dict) and value and all(isinstance(item, kinds) for item in value.values())


def is_grid(value):
    """Whether a value is a grid: a dict, field -> list of values."""
    return is_dict(value, list, tuple) and all(value.values())


def read_file(path):
    """The Study that a file describes; its control is a dict with a key for each arm.

    Raises ValueError, naming the file, the line and the field, for a file that is not a study.
    """
    values = configurator.read_config_file(path, functions=("grid",))
    if "arms" not in values or "control" not in values:
        raise ValueError(
            f"{path} is not a study, since it does not set arms and control: name the study before its size"
        )
    names = [each.name for each in dataclasses.fields(Study) if each.init]
    study = Study(**{configurator.known(name, names, where): value for name, (value, where) in values.items()})
    study.where = dict.fromkeys(names, str(path)) | {name: where for name, (_, where) in values.items()}

    def require(is_right, name, what):
        if not is_right:
            raise ValueError(f"{study.where[name]}: {name} must be {what}, got {values[name][0]!r}")

    arms = study.arms
    require(is_dict(arms, str), "arms", "a dict such as {'baseline': 'config/baseline_tied.py'}")
    for arm in arms:  # it becomes a folder's name, and never names another folder, as .. would
        if not (isinstance(arm, str) and re.fullmatch(r"\.*[\w+-][\w.+-]*", arm)):
            raise ValueError(
                f"{study.where['arms']}: an arm must be named by letters, digits and . + - _, not by dots alone, got "
                f"{arm!r}"
            )
    if isinstance(study.control, str):
        study.control = dict.fromkeys(arms, study.control)
    require(is_dict(study.control, str), "control", "an arm, or a dict: arm -> its control")
    require({*study.control, *study.control.values()} <= {*arms}, "control", f"among the arms {', '.join(arms)}")
    study.control = {arm: study.control.get(arm, arm) for arm in arms}
    require(
        callable(study.grid) or is_grid(study.grid) or study.grid == {},
        "grid",
        "a dict: field -> list of values, or a function of the size",
    )
    require(isinstance(study.settings, str), "settings", "a text of arguments")
    where = study.where["seeds"]
    study.seeds = check_seeds(configurator.coerce("seeds", study.seeds, tuple[int, ...], where), where)
    for name, kind in (("tuning_seeds", tuple[int, ...]), ("equal_within", float | None), ("about", tuple[str, ...])):
        setattr(study, name, configurator.coerce(name, getattr(study, name), kind, study.where[name]))
    require(set(study.tuning_seeds) < {*study.seeds}, "tuning_seeds", f"some of the seeds {study.seeds}, and not all")
    require(study.equal_within is None or study.equal_within > 0, "equal_within", "a fraction such as 0.005")
    for name in study.about:
        configurator.known(name, configurator.field_types(TrainConfig), study.where["about"])
    return study


def check_seeds(seeds, where):
    """seeds; raises ValueError, beginning with where, unless there is at least one and each is there once."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{where}: seeds must be a list with each seed once, such as 1,2,3, got {','.join(map(str, seeds))!r}"
        )
    return seeds
