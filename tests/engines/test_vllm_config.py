"""The plugin's settings, without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinweight.engines.vllm.config import Config, from_environment, resolve
from twinweight.errors import ConfigError


def test_nothing_given_is_off() -> None:
    assert resolve({}, {}) == resolve(None, {}) == Config(mode="off")


def test_additional_config_wins_over_variables() -> None:
    environ = {"TWINWEIGHT_MODE": "hard", "TWINWEIGHT_KV_FLOOR": "4096", "TWINWEIGHT_CROSSOVER": "64"}
    assert resolve({"twinweight": {"mode": "soft", "kv_floor": 32768}}, environ) == Config("soft", kv_floor=32768, crossover=64)


def test_the_default_is_exact_and_8_bits_are_asked_for() -> None:
    assert resolve({"twinweight": {"mode": "soft"}}, {}).dtype == "dense"
    assert resolve({"twinweight": {"mode": "soft"}}, {"TWINWEIGHT_DTYPE": "int8"}).dtype == "int8"
    assert resolve({"twinweight": {"mode": "soft", "dtype": "fp8"}}, {"TWINWEIGHT_DTYPE": "int8"}).dtype == "fp8"


def test_a_workload_is_prompt_lengths_or_what_a_server_saw(tmp_path: Path) -> None:
    for given in ([512, 2048], "512, 2048"):
        assert resolve({"twinweight": {"workload": given}}, {}).workload == (512, 2048)
    assert resolve({"twinweight": {"workload": 512}}, {}).workload == (512,)
    assert resolve({}, {"TWINWEIGHT_WORKLOAD": "512"}).workload == (512,)
    seen = tmp_path / "seen.txt"
    seen.write_text('twinweight_calls_total{path="twin",rows="512"} 7\n')
    assert resolve({}, {"TWINWEIGHT_WORKLOAD": str(seen)}).workload == str(seen)
    seen.write_text("nothing")
    with pytest.raises(ConfigError, match=r"TWINWEIGHT_WORKLOAD: .*holds no calls"):
        resolve({}, {"TWINWEIGHT_WORKLOAD": str(seen)})


def test_a_field_may_be_null() -> None:
    assert resolve({"twinweight": {"mode": "soft", "kv_floor": None, "reload": None}}, {}) == Config("soft")
    assert resolve({"twinweight": {"mode": None, "dtype": None}}, {}) == Config()


@pytest.mark.parametrize(("given", "found"), [(False, False), ("0", False), ("False", False), (True, True), ("1", True)])
def test_weights_may_stay_what_they_are(given: object, found: bool) -> None:
    assert resolve({"twinweight": {"reload": given}}, {}).reload is found
    assert resolve({}, {"TWINWEIGHT_RELOAD": str(given)}).reload is found


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({"VLLM_W4A16_PREFILL_BF16": "1"}, "soft"),
        ({"VLLM_W4A16_PREFILL_BF16": "0"}, "off"),
        ({"VLLM_W4A16_PREFILL_BF16": "1", "TWINWEIGHT_MODE": "off"}, "off"),
        ({"TWINWEIGHT_MODE": ""}, "off"),
    ],
)
def test_switches(environ: dict[str, str], mode: str) -> None:
    assert resolve({}, environ).mode == mode


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "sotf"}, r"additional_config\['twinweight'\]\['mode'\].*'sotf'.*off, soft, hard"),
        ({"mode": 1}, "mode is 1, expected one of off, soft, hard"),
        ({"mode": "soft", "kvfloor": 1}, "unknown field 'kvfloor'; known: mode, dtype, head, kv_floor"),
        ({"dtype": "int4"}, r"\['dtype'\]: twin dtype is 'int4', expected one of dense, int8, fp8"),
        ({"dtype": ["int8"]}, r"twin dtype is \['int8'\], expected one of"),
        ({"head": "int4"}, r"\['head'\]: output head is 'int4', expected one of dense, int8"),
        ({"kv_floor": -1}, r"\['kv_floor'\] is -1, expected a whole number of at least 0"),
        ({"kv_floor": 1.5}, "is 1.5, expected a whole number"),
        ({"crossover": 0}, "is 0, expected a whole number of at least 1"),
        ({"crossover": True}, "is True, expected a whole number"),
        ({"reload": "never"}, r"\['reload'\] is 'never', expected true or false"),
        ({"graphs_reserve_mib": "64"}, "is '64', expected a whole number"),
        ({"workload": []}, r"\['workload'\] is \[\], expected prompt lengths such as"),
        ({"workload": [512, 0]}, r"is \[512, 0\], expected prompt lengths"),
        ({"workload": [True]}, "expected prompt lengths"),
        ({"workload": 1.5}, "is 1.5, expected prompt lengths"),
        ({"workload": "/nowhere/metrics.txt"}, r"\['workload'\]: cannot read metrics from /nowhere/metrics.txt"),
        ("soft", "is 'soft', expected an object"),
    ],
)
def test_bad_values_say_where_and_what(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"twinweight": given}, {})


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TWINWEIGHT_MODE", "on"), ("TWINWEIGHT_DTYPE", "8"), ("TWINWEIGHT_KV_FLOOR", "many"), ("TWINWEIGHT_CROSSOVER", "-3")],
)
def test_bad_variables_are_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}.*{value}"):
        from_environment({variable: value})


def test_an_unknown_variable_matters_only_where_twins_are_on() -> None:
    environ = {"TWINWEIGHT_KVFLOOR": "1"}
    assert resolve({}, environ).mode == "off"
    with pytest.raises(ConfigError, match=r"unknown variable TWINWEIGHT_KVFLOOR; known: .*TWINWEIGHT_KV_FLOOR"):
        resolve({"twinweight": {"mode": "soft"}}, environ)


@pytest.mark.parametrize(
    ("given", "calls"),
    [
        (None, {1: 64, 8: 16, 4096: 1}),
        ((512,), {1: 64, 8: 16, 512: 1}),
        ((512, 8), {1: 64, 8: 16.5, 512: 0.5}),
        ((6144,), {1: 64, 8: 16, 2048: 0.5, 4096: 0.5}),  # two steps
    ],
)
def test_what_is_planned_for(given: tuple[int, ...] | None, calls: dict[int, float]) -> None:
    found, total = Config(workload=given).planned_for(4096), sum(calls.values())
    assert dict(found.calls) == pytest.approx({m: n / total for m, n in calls.items()})


def test_what_is_planned_for_may_be_what_a_server_saw(tmp_path: Path) -> None:
    seen = tmp_path / "seen.txt"
    seen.write_text('twinweight_calls_total{path="int4",rows="1"} 3\ntwinweight_calls_total{path="twin",rows="512"} 1\n')
    assert Config(workload=str(seen)).planned_for(4096).calls == ((1, 0.75), (512, 0.25))
