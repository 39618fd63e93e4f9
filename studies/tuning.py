"""Which runs a study with tuning seeds needs: all of these seeds, and of the other seeds those at the chosen points."""

from collections import Counter

from engine import run_files
from engine.flops import cost
from studies import arms, store


class Choice:
    """The points that a study's tuning seeds choose for each arm, once all of the arm's runs with them have ended.

    content: that of study.json. A study without tuning seeds needs all of its runs.
    """

    def __init__(self, folder, content):
        self.folder = folder
        self.seeds = {*content.get("tuning_seeds", ())} & {*content["seeds"]}
        self.arm = {entry["name"]: entry["arm"] for entry in content["arms"]}
        self.chosen = {}  # arm -> the names of its entries that are chosen, at each size one

    def waits_for(self, name, seed):
        """The folders of the runs that must end before it is known whether a run is needed."""
        arm = self.arm[name]
        if not self.seeds or seed in self.seeds or arm in self.chosen:
            return []
        names = [other for other in self.arm if self.arm[other] == arm]
        folders = [store.run_folder(self.folder, name, seed) for name in names for seed in sorted(self.seeds)]
        return [folder for folder in folders if not run_files.has_ended(folder)]

    def needs(self, name, seed):
        """Whether a run that waits for no other is needed."""
        arm = self.arm[name]
        if not self.seeds or seed in self.seeds:
            return True
        if arm not in self.chosen:
            self.chosen[arm] = arms.chosen_names(self.folder, arm)
        return name in self.chosen[arm]

    def shares(self, runs):
        """PlannedRun -> 1, 0, or where it is not known yet whether it is needed, 1 / the points that may be chosen."""
        known, open_runs = {}, {}
        for run in runs:
            if self.waits_for(run.name, run.seed):
                size = cost(run.config.model_config()).total, run.tokens
                open_runs[run] = (self.arm[run.name], run.seed, *size)
            else:
                known[run] = float(self.needs(run.name, run.seed))
        points = Counter(open_runs.values())
        return known | {run: 1 / points[place] for run, place in open_runs.items()}
