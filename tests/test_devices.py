import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from engine import devices

def faults_of_filling(n_bytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(n_bytes, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(devices.keep_freed_memory() if {kept} else True, *(faults_of_filling(2**26) for _ in range(8)))
"""


@pytest.mark.parametrize("kept", [True, False])
def test_kept_memory_is_taken_again_without_a_page_fault(kept):
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, text=True, check=True)
    possible, *faults = run.stdout.split()
    if possible == "False":
        pytest.skip("no mallopt here")
    last = int(faults[-1])  # 64 MiB are 16,384 small pages, 32 large ones; the first blocks may not fit for the next
    assert last < 8 if kept else last >= 32
