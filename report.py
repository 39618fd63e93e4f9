"""Compare runs: the options and losses of each arm, and whether its difference from control is significant.

python report.py out/study_wd_scale-quick                            a study of sweep.py, finished or not
python report.py out/quick-baseline_tied out/quick-reduced_tied      run folders; the first is the control
python report.py out/baseline-s* out/reduced-s*                      runs that differ only in the seed are one arm
python report.py out/study_lr-quick --out_dir=results/lr --pack      keep its runs, too, in one small file
python report.py results/lr                                          write that report anew from the file

Writes report.md, report.html (one file that contains its figures), runs.csv, comparison.csv and the figures into
out_dir, and prints the table and the verdicts.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import configurator
from engine.files import make_folder
from studies import arms, packed, page, store, writing
from train_config import TrainConfig


@dataclass
class ReportConfig:
    """Which runs to compare, and where the report is written."""

    runs: tuple[str, ...] = ()  # a study folder, or run folders; given without --runs=
    control: str | None = None  # the arm to compare all others with; none: the study's own, or the first run's
    about: tuple[str, ...] = ()  # the options in which arms are meant to differ; of others warn; none: the study's
    out_dir: configurator.FilePath | None = None  # the report's folder; none: report/ in the study's, or out/report
    pack: bool = False  # keep the runs in one small file beside the report, which report.py can then write anew

    def __post_init__(self):
        for name in self.about:
            configurator.known(name, configurator.field_types(TrainConfig), "about")


def write_report(cfg):
    """Write the report; (its folder, its table of arms, its headlines).

    Raises ValueError when there is nothing to report, or when the runs cannot be compared; see arms.load.
    """
    if not cfg.runs:
        raise ValueError("name a study folder, or the run folders to compare: python report.py out/FIRST out/SECOND")
    default = Path(cfg.runs[0], "report") if store.is_study(cfg.runs[0]) else "out/report"
    folder = Path(cfg.out_dir or default)
    path = folder / packed.NAME
    if cfg.pack:
        make_folder(folder)
        packed.pack(cfg.runs, path)
    elif packed.is_packed(cfg.runs[0]):
        if len(cfg.runs) > 1:
            raise ValueError(f"{cfg.runs[0]} holds the runs of a report: leave out the others")
        folder, path = Path(cfg.out_dir or cfg.runs[0]), Path(cfg.runs[0], packed.NAME)
    else:
        return writing.write(arms.load(cfg.runs, cfg.control, cfg.about), folder)
    with tempfile.TemporaryDirectory() as unpacked:  # what was packed, so that it gives the same report later
        return writing.write(arms.load(packed.unpack(path, unpacked), cfg.control, cfg.about, unpacked), folder)


def main(argv):
    """The command; see the module's docstring."""
    folder, table, headlines = write_report(configurator.parse(ReportConfig, argv, positional="runs"))
    print(f"{table.markdown()}\n\n{page.Items(headlines).markdown()}")
    print(f"\n{folder}/report.md, {folder}/report.html")


if __name__ == "__main__":
    configurator.run(main)
