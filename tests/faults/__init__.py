"""The proof that what a run or a preparation has written survives: kills, power cuts, full disks, two writers, damage.

    python -m tests.faults                                            everything (about half an hour on one core)
    python -m tests.faults --only=kills,signals --kills=1000 --seed=1

Prints a table, and writes it to --out. Linux only: the trials are children of one process, made by fork, that have
imported everything already, so that one takes less than a second.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
for place in (TESTS, TESTS.parent):  # conftest and run_folders; the project
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
