"""Loading peaks below 1.3 times what stays, seen from outside the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinweight import presets, synth

CHILD = """
import sys, accelerate, twinweight
from transformers import GenerationConfig, Qwen3ForCausalLM
from twinweight.engines import hf
print("ready", flush=True); sys.stdin.readline()
model = twinweight.load(sys.argv[1], mode=sys.argv[2], device="cpu", progress=False)
print("loaded", flush=True); sys.stdin.readline()
"""


def status(pid: int, key: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak), from the kernel."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mode", ["off", "soft"])
def test_loading_peaks_below_1_3_of_what_stays(mode: str, tmp_path: Path) -> None:
    synth.write(presets.preset("qwen3-0.6b", 8), tmp_path / "model")
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "model"), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        base = status(child.pid, "VmRSS")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == "loaded"
        peak, final = status(child.pid, "VmHWM") - base, status(child.pid, "VmRSS") - base
        child.stdin.write("\n")
        child.stdin.flush()
    print(f"{mode}: peak {peak / 2**20:.0f} MiB, stays {final / 2**20:.0f} MiB over the imports")
    assert final > 250 << 20
    assert peak < 1.3 * final
