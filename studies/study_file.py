"""A study's file: arms, grid, seeds and controls."""

import dataclasses
import re
from dataclasses import dataclass, field

import configurator


@dataclass
class Study:
    """What a study's file sets.

    In its texts {field} stands for a field's value as the files of the size and the command line set it, so that
    "{learning_rate}/2" and "--n_embd={n_embd}*31//32" suit any size.
    """

    arms: dict  # name -> arguments of train.py, as typed: "config/reduced_tied.py --attn_scale=1"
    control: str | dict  # the arm that all are compared with; or a dict: arm -> its own control
    grid: dict = field(default_factory=dict)  # field -> list of values, or dict: value -> arguments it brings along
    settings: str = ""  # arguments for all arms, after theirs
    seeds: tuple[int, ...] = (1, 2, 3)  # of the weights and the order of the data


def read_file(path):
    """The Study that a file describes; its control is a dict of all arms.

    Raises ValueError, naming the file, the line and the field, for a file that is no study.
    """
    values = configurator.read_config_file(path)
    if "arms" not in values or "control" not in values:
        raise ValueError(f"{path} sets no arms and control, so it is not a study: a study comes first, then its size")
    names = [each.name for each in dataclasses.fields(Study)]
    result = Study(**{configurator.known(name, names, where): value for name, (value, where) in values.items()})

    def require(is_right, name, what):
        if not is_right:
            raise ValueError(f"{values[name][1]}: {name} must be {what}, not {values[name][0]!r}")

    def is_dict(value, *kinds):
        return isinstance(value, dict) and value and all(isinstance(item, kinds) for item in value.values())

    arms = result.arms
    require(is_dict(arms, str), "arms", "a dict such as {'baseline': 'config/baseline_tied.py'}")
    require(all(re.fullmatch(r"[\w.+-]+", str(arm)) for arm in arms), "arms", "named by letters, digits and . + - _")
    if isinstance(result.control, str):
        result.control = dict.fromkeys(arms, result.control)
    require(is_dict(result.control, str), "control", "an arm, or a dict: arm -> its control")
    require({*result.control, *result.control.values()} <= {*arms}, "control", f"of the arms {', '.join(arms)}")
    result.control = {arm: result.control.get(arm, arm) for arm in arms}
    is_grid = is_dict(result.grid, list, tuple, dict) and all(result.grid.values())
    require(is_grid or result.grid == {}, "grid", "a dict: field -> list of values")
    require(isinstance(result.settings, str), "settings", "a text of arguments")
    where = values.get("seeds", (None, path))[1]
    result.seeds = check_seeds(configurator.coerce("seeds", result.seeds, tuple[int, ...], where), where)
    return result


def check_seeds(seeds, where):
    """seeds; raises ValueError unless there are some, each once."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: seeds must be given, each once, such as 1,2,3, not {','.join(map(str, seeds))!r}")
    return seeds
