"""Metrics between a worker and a front end, without a server."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from prometheus_client import CollectorRegistry, generate_latest

from tests.engines.vllm.jobs import times_logged
from twinweight.engines.vllm import compat, metrics
from twinweight.engines.vllm.metrics import Collector, Publisher

STATUS = {
    "twins": 3, "copies": 2, "missed": 1, "bytes": 4096, "kv_tokens": 17, "calls": {"int4": {"1": 5}, "twin": {"256": 2}}
}  # fmt: skip


class Worker:
    def __init__(self) -> None:
        self.found: dict[str, Any] = dict(STATUS)

    def status(self) -> dict[str, Any]:
        return self.found


def scrape(collector: Collector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


@pytest.fixture
def collector(tmp_path: Path) -> Collector:
    found = Collector()
    found.open(tmp_path / "metrics")
    return found


def published(collector: Collector, rank: int = 0) -> tuple[Worker, Publisher]:
    assert collector.where is not None
    worker = Worker()
    publisher = Publisher(collector.where, {"engine": "0", "rank": str(rank)}, worker.status)
    return worker, publisher


def test_what_a_worker_writes_is_served(collector: Collector) -> None:
    worker, publisher = published(collector)
    publisher.write()
    text = scrape(collector)
    assert 'twinweight_twins{engine="0",rank="0"} 3.0' in text
    assert 'twinweight_copies{engine="0",rank="0"} 2.0' in text
    assert 'twinweight_missed{engine="0",rank="0"} 1.0' in text
    assert 'twinweight_bytes{engine="0",rank="0"} 4096.0' in text
    assert 'twinweight_kv_tokens_given_up{engine="0",rank="0"} 17.0' in text
    assert 'twinweight_calls_total{engine="0",path="int4",rank="0",rows="1"} 5.0' in text
    assert 'twinweight_calls_total{engine="0",path="twin",rank="0",rows="256"} 2.0' in text
    worker.found = {**STATUS, "calls": {"int4": {"1": 6}}}
    publisher.write()
    assert 'path="int4",rank="0",rows="1"} 6.0' in scrape(collector)


def test_nothing_is_written_without_a_front_end_or_a_change(tmp_path: Path, collector: Collector) -> None:
    worker = Worker()
    alone = Publisher(tmp_path / "nobody", {}, worker.status)
    assert alone.write()
    assert not (tmp_path / "nobody").exists()
    worker, publisher = published(collector)
    publisher.write()
    publisher.file.unlink()
    assert publisher.write()
    assert not publisher.file.exists()


def test_a_worker_that_is_gone_takes_its_file_along(collector: Collector) -> None:
    worker, publisher = published(collector)
    publisher.write()
    del worker
    assert not publisher.write()
    assert not publisher.file.exists()


def test_files_of_dead_processes_are_ignored(collector: Collector) -> None:
    assert collector.where is not None
    (collector.where / "999999999.json").write_text(json.dumps({"labels": {"engine": "0", "rank": "0"}, **STATUS}))
    assert "twinweight_twins{" not in scrape(collector)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"labels": {}}'])
def test_damage_costs_the_metrics_and_one_warning(
    collector: Collector, content: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    _, publisher = published(collector)
    publisher.file.write_text(content)
    for _ in range(3):
        assert "twinweight_twins{" not in scrape(collector)
    assert times_logged(caplog, "cannot be read") == 1


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="somebody else"):
        Collector().open(tmp_path / "link")
    monkeypatch.setattr(metrics.os, "getuid", lambda: 12345)
    with pytest.raises(OSError, match="somebody else"):
        Collector().open(tmp_path / "other")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `show` changes, put back."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    monkeypatch.setattr(metrics, "_collector", None)
    monkeypatch.setattr(MultiProcessCollector, "collect", MultiProcessCollector.collect)
    yield
    if metrics._collector in REGISTRY._collector_to_names:
        REGISTRY.unregister(metrics._collector)


def show_and_take_away(config: SimpleNamespace, registry: Callable[[], CollectorRegistry]) -> None:
    metrics.show(config, on=True)
    worker = Worker()
    Publisher(metrics.directory(config), {"engine": "0", "rank": "0"}, worker.status).write()
    assert generate_latest(registry()).count(b"twinweight_twins{") == 1
    metrics.show(config, on=False)  # the next server of this process has no twins
    assert b"twinweight_twins{" not in generate_latest(registry())
    metrics.show(config, on=True)
    assert generate_latest(registry()).count(b"twinweight_twins{") == 1


@pytest.mark.usefixtures("fresh")
def test_one_api_server_shows_them_in_the_global_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(metrics.tempfile, "gettempdir", lambda: str(tmp_path))
    show_and_take_away(SimpleNamespace(instance_id="17"), get_prometheus_registry)


@pytest.mark.usefixtures("fresh")
def test_api_servers_that_share_an_engine_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert metrics.directory(SimpleNamespace(instance_id="1")) == metrics.directory(SimpleNamespace(instance_id="2"))
    show_and_take_away(SimpleNamespace(instance_id="1"), get_prometheus_registry)


@pytest.mark.usefixtures("fresh")
def test_a_server_starts_without_metrics_where_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "missing" / "parent"))
    metrics.show(SimpleNamespace(instance_id="x"), on=True)
    metrics.publish(SimpleNamespace(), Worker().status)
    assert times_logged(caplog, "has no metrics") == 2


def test_hooks_are_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    monkeypatch.setattr(PrometheusStatLogger, "__init__", PrometheusStatLogger.__init__)
    compat.on_metrics(lambda config: None)
    once = PrometheusStatLogger.__init__
    compat.on_metrics(lambda config: None)
    assert PrometheusStatLogger.__init__ is once
