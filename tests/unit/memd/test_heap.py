from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from memd.heap import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        several = [np.ones(1 << 17) for _ in range(8)]
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(int(keep_freed_memory()))
page_faults()
print(page_faults())
"""


def test_temporaries_of_megabytes_are_faulted_in_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    is_kept, num_faults = map(int, done.stdout.split())
    if not is_kept:
        pytest.skip("the C library has no mallopt")
    # Ten times 8 MiB are 20,480 pages; by default nearly all of them are faulted in.
    assert num_faults < 1_000
