"""A large trace in bounded time and memory. 300 MB, by hand: `python -m tests.roofline.generate big.json 300`, then
`/usr/bin/time -v twinweight roofline big.json`: 8 s and 0.3 GB on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.roofline.generate import large

CODE = """
import json, sys, time
from pathlib import Path
from twinweight.roofline.run import roofline
start = time.process_time()
result = roofline([Path(sys.argv[1])])
status = Path("/proc/self/status").read_text()  # not ru_maxrss, which begins with the parent's
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([time.process_time() - start, peak, result["attributed"], len(result["ops"])]))
"""


def test_a_trace_of_30_megabytes(tmp_path: Path) -> None:
    path = large(tmp_path / "big.json", 30)
    assert path.stat().st_size >= 30e6
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=True)
    seconds, peak, attributed, ops = json.loads(done.stdout)
    assert attributed == 1.0
    assert ops == 8
    # A tenth of what a 300 MB trace may take, with the same share of memory above what Python itself needs.
    assert seconds < 6
    assert peak < 50e6 + 2e9 / 10
