"""Building a twin needs the twin and at most 64 MiB more, seen from outside the process."""

import subprocess
import sys

import pytest

from tests.engines.test_peak import status

CHILD = """
import sys, torch
from tests.helpers import random_weight
from twinweight.linear import Int4Linear
from twinweight.weight import Int4Weight
n, k = 8192, 8192
words = torch.randint(-2**31, 2**31 - 1, (n, k // 8), dtype=torch.int32)
linear = Int4Linear(Int4Weight(words, torch.rand(n, k // 128).bfloat16(), None, None, 128, k))
small = Int4Linear(random_weight(256, 256, 128)); small.build_twin(sys.argv[1])
print("ready", flush=True); sys.stdin.readline()
linear.build_twin(sys.argv[1])
print("built", flush=True); sys.stdin.readline()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_building_peaks_at_the_twin_and_64_mib(dtype: str, itemsize: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        before, peak_before = status(child.pid, "VmRSS"), status(child.pid, "VmHWM")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == "built"
        peak = status(child.pid, "VmHWM")
        child.stdin.write("\n")
        child.stdin.flush()
    assert peak > peak_before  # else an earlier peak hides this one
    assert peak - before <= 8192 * 8192 * itemsize + (64 << 20)
