# Each architecture that the paper names, with and without W_Q. Losses are comparable within a pair only: the encoder,
# for example, has a different objective.
#     python sweep.py config/study_arch.py config/quick.py
_overlays = ["rope", "gqa", "mqa", "rmsnorm", "dyt", "nonorm", "parallel", "shared", "moe", "encoder"]
_files = {"": "", **{f"{_name}-": f"config/{_name}.py " for _name in _overlays}}

arms = {}
for _pair in _files:
    arms[_pair + "baseline"] = _files[_pair] + "config/baseline_tied.py"
    arms[_pair + "reduced"] = _files[_pair] + "config/reduced_tied.py"
control = {_pair + "reduced": _pair + "baseline" for _pair in _files}
seeds = [1, 2, 3]
