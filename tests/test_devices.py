import os
import re
import subprocess
import sys

import pytest
import torch

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
    fewest = min(map(int, faults))  # 64 MiB are 16,384 small pages, 32 large ones; the first blocks are new in any case
    assert fewest < 8 if kept else fewest >= 32


@pytest.mark.parametrize(("isa", "warned"), [("AVX2", True), ("DEFAULT", False)])
def test_a_dtype_without_instructions_is_one_line_of_warning(isa, warned):
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()):
        pytest.skip("needs a processor with AMX, whose library can be kept from using it")
    code = "import torch; from engine import devices; cpu = torch.device('cpu')\n" + 2 * (
        "print(devices.choose_dtype('bfloat16', cpu, None))\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["torch.bfloat16"] * 2
    lines = run.stderr.splitlines()
    assert len(lines) == warned
    if warned:
        factor = float(re.search(r"takes ([\d.]+) times as long .* bfloat16 .*--dtype=bfloat16", lines[0])[1])
        assert factor > 5
