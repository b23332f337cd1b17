"""The command line from outside: tables, JSON, exit codes, errors without tracebacks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import twinweight
from tests.test_synth import tiny
from twinweight import synth
from twinweight.cli import main


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from twinweight.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"} | env)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process (each of its own imports torch for two seconds): its exit code, and what it said of it."""

    def run_inside(*args: object, **env: str) -> tuple[int, str]:
        with monkeypatch.context() as changed:
            changed.setattr(sys, "argv", ["twinweight", *map(str, args)])
            for name, value in {"COLUMNS": "80", **env}.items():
                changed.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        printed = capsys.readouterr()
        assert printed.out == ""
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.err

    return run_inside


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "model"
    synth.write(tiny("qwen3-0.6b"), out, group_size=32)
    return out


def test_bench_prints_the_table_and_writes_json(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sub" / "bench.json"
    done = run("bench", model, "--prompt-tokens", 64, "--output-tokens", 4, "--repeats", 2, "--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stderr
    for word in ("TTFT", "TPOT", "KV cache (tokens)", "weights with a twin"):
        assert word in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("written")) <= 80
    result = json.loads(file.read_text())
    assert result["command"].startswith("twinweight bench ")
    assert result["arms"].keys() == {"off", "on"}
    for arm in result["arms"].values():
        assert arm.keys() == {
            "ttft_ms", "prefill_tok_s", "tpot_ms", "e2e_ms", "kv_cache_gib", "kv_cache_tokens", "twin_gib", "twins", "weights"
        }  # fmt: skip
        for key in ("ttft_ms", "prefill_tok_s", "tpot_ms", "e2e_ms"):
            assert 0 < arm[key]["min"] <= arm[key]["median"] <= arm[key]["max"]
        assert arm["weights"] == 14
    off, on = result["arms"]["off"], result["arms"]["on"]
    assert off["twins"] == off["twin_gib"] == 0
    assert on["kv_cache_tokens"] <= off["kv_cache_tokens"]
    assert result["ratios"]["ttft"] == pytest.approx(off["ttft_ms"]["median"] / on["ttft_ms"]["median"], rel=1e-2)
    assert result["ratios"]["tpot"] == pytest.approx(on["tpot_ms"]["median"] / off["tpot_ms"]["median"], rel=1e-2)
    assert result["noise"].keys() == result["ratios"].keys() == {"ttft", "tpot", "e2e"}
    assert {"device", "torch", "transformers", "date", "model"} <= result["environment"].keys()


def test_inspect_and_load_check(model: Path, tmp_path: Path) -> None:
    commands = (
        ("inspect", model, "--json", tmp_path / "i.json"),
        ("load-check", model, "--device", "cpu", "--twin-dtype", "int8", "--json", tmp_path / "8.json"),
        ("load-check", model, "--device", "cpu", "--json", tmp_path / "c.json"),
    )
    with ThreadPoolExecutor(2) as two:  # each imports torch for two seconds
        runs = list(two.map(lambda command: run(*command), commands))
    for done in runs:
        assert done.returncode == 0, done.stderr
    shapes = json.loads((tmp_path / "i.json").read_text())["shapes"]
    assert sum(s["count"] for s in shapes) == 14
    assert max(len(line) for line in runs[1].stdout.splitlines() if not line.startswith("written: ")) <= 80
    twins = {c["twin"]: c["rounded"] for c in json.loads((tmp_path / "8.json").read_text())["checked"]}
    assert all((0 < share < 0.01) == (kind == "int8") for kind, share in twins.items())
    checked = json.loads((tmp_path / "c.json").read_text())
    assert checked["ok"]
    assert all(c["exact"] for c in checked["checked"])


def test_synth_writes_a_model(tmp_path: Path) -> None:
    done = run(
        "synth", tmp_path / "m", "--like", "qwen3-0.6b", "--layers", 1, "--format", "awq", "--asymmetric", "--group-size", 64
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    assert "7 int4 weights" in done.stdout


SHIPPED = Path(__file__).parents[1] / "models" / "stdlib-15m"
"""Large enough that twins pay whatever else runs."""


def test_exit_codes(model: Path, tmp_path: Path, inside: Callable[..., tuple[int, str]]) -> None:
    cases = [
        (("inspect", tmp_path / "none"), {}, 2, "directory"),
        (("synth", tmp_path / "x", "--like", "qwen3-0.6b", "--group-size", 16), {}, 2, "32, 64, 128"),
        (("bench", model, "--mode", "off"), {}, 2, "two arms"),
        (("bench", model, "--rounds", 2), {}, 2, "--rounds"),
        (("bench", model, "--device", "cpu", "--prompt-tokens", 10**6), {}, 2, "positions"),
        (("bench", model, "--device", "cpu", "--batch", 10**6), {}, 2, "GiB of memory are free"),
        (("profile", model, "--device", "cpu", "--out", model / "config.json" / "x"), {}, 2, "cannot write"),
        (("tune", model, "--device", "cpu"), {"TWINWEIGHT_CACHE": "~no-such-user/x"}, 2, "TWINWEIGHT_CACHE"),
        (("load-check", model, "--device", "cpu"), {"VLLM_W4A16_PREFILL_BF16": "yes"}, 2, "VLLM_W4A16_PREFILL_BF16"),
        (("synth", tmp_path / "x", "--like", "gpt-9"), {}, 2, "qwen3-0.6b"),
        (("bench", model, "--image", "big"), {}, 2, "WIDTHxHEIGHT"),
        (("bench", model, "--utilization", 3, "--device", "cpu"), {}, 2, "utilization"),
        (("bench", SHIPPED, "--mode", "hard", "--utilization", 0.0001, "--device", "cpu"), {}, 5, "left for twins"),
        (("load-check", model, "--device", "cpu"), {"TWINWEIGHT_MODE": "maybe"}, 2, "maybe"),
        (("bench", model, "--no-such-option"), {}, 2, "no-such-option"),
    ]
    for args, settings, code, word in cases:
        ended, said = inside(*args, **settings)
        assert ended == code, (args, said)
        assert word in said
        assert "Traceback" not in said


def test_a_full_disk_is_one_message(model: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "twinweight", "inspect", str(model)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.split()) == (0, ["twinweight", twinweight.__version__])


@pytest.mark.parametrize("damage", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"vocab_size": -5}])
def test_a_damaged_configuration_is_one_message(
    model: Path, tmp_path: Path, damage: dict[str, object], inside: Callable[..., tuple[int, str]]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    (bad / "config.json").write_text(json.dumps({**json.loads((bad / "config.json").read_text()), **damage}))
    code, said = inside("inspect", bad)
    assert code == 3
    assert "config.json" in said
    assert "Traceback" not in said


def test_a_truncated_file_is_one_message(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    file = next(bad.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    done = run("load-check", bad)
    assert done.returncode == 3
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("--debug", "load-check", bad).stderr


@pytest.mark.parametrize(
    ("option", "value", "message"), [("--kv-floor", -1, "KV floor is -1"), ("--device", "meta", "no GPU of that kind")]
)
def test_settings_that_no_machine_has_are_refused(model: Path, option: str, value: object, message: str) -> None:
    done = run("load-check", model, option, value)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "twinweight", "plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--gpu" in done.stdout
