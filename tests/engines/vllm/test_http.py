"""`vllm serve` with the plugin, asked over HTTP by a real client."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm.jobs import CLEAR, ON, ROOT, SIZES, Job, environment, flags, needs_kernel, result
from tests.engines.vllm.models import PROMPTS, linears, short
from twinweight.engines.vllm.metrics import INTERVAL
from twinweight.workload import from_metrics

pytestmark = needs_kernel

MODEL = short()


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return str(response.read().decode())

    def rpc(self, method: str, **kwargs: str) -> list[Any]:
        body = json.dumps({"method": method, "kwargs": kwargs}).encode()
        request = urllib.request.Request(self.url + "/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return list(json.loads(response.read())["results"])

    def complete(self, prompt: tuple[int, ...]) -> list[str]:
        """The tokens of a greedy completion, streamed."""
        import openai

        client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(
            model="model", prompt=list(prompt), max_tokens=12, temperature=0, stream=True, logprobs=1,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )  # fmt: skip
        return [token for chunk in stream for choice in chunk.choices for token in choice.logprobs.tokens]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", "model", "--host",
        "127.0.0.1", "--port", str(port), "--enforce-eager", *flags(SIZES),
        "--skip-tokenizer-init", "--no-enable-prefix-caching", "--additional-config", ON,
    ]  # fmt: skip
    environ = environment((("VLLM_SERVER_DEV_MODE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "1")))
    with log.open("w") as out, subprocess.Popen(command, env=environ, cwd=ROOT, stdout=out, stderr=out) as process:
        found = Server(f"http://127.0.0.1:{port}", log)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-6000:]
                try:
                    found.get("/health")
                    break
                except OSError:
                    time.sleep(0.5)
            yield found
        finally:
            process.terminate()


@pytest.mark.parametrize("which", range(3))
def test_streamed_tokens_are_those_of_a_server_without_twins(server: Server, which: int) -> None:
    off = result(Job(MODEL))
    ids, leads = ([off["ids"][0][0], *off["ids"][1][1:]][which], [off["leads"][0][0], *off["leads"][1][1:]][which])
    clear = next((i for i, lead in enumerate(leads) if lead < CLEAR), len(ids))
    assert server.complete(PROMPTS[which])[:clear] == [f"token_id:{i}" for i in ids[:clear]]


def test_metrics_show_twins_and_calls(server: Server, tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.complete(PROMPTS[0])
    time.sleep(2.5 * INTERVAL)
    (tmp_path / "metrics").write_text(server.get("/metrics"))
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "metrics").read_text())}
    assert "vllm:num_requests_running" in families
    values = {name: f.samples[0].value for name, f in families.items() if name.startswith("twinweight_")}
    assert values["twinweight_twins"] == linears(MODEL)
    assert 0 <= values["twinweight_copies"] <= linears(MODEL)
    assert values["twinweight_missed"] == 0
    assert values["twinweight_bytes"] > 0
    assert families["twinweight_calls"].type == "counter"
    assert "CUDA graph" in families["twinweight_calls"].documentation
    calls = {(s.labels["path"], s.labels["rows"]): s.value for s in families["twinweight_calls"].samples}
    assert calls["int4", "1"] >= 11 * linears(MODEL)
    assert any(path == "twin" for path, _ in calls)
    assert {s.labels["rank"] for s in families["twinweight_calls"].samples} == {"0"}
    seen = dict(from_metrics(tmp_path / "metrics").calls)
    assert seen[1] > 0.8  # decode steps, one token each
    assert 1 < max(seen) <= 2048


def test_weights_are_reloaded_over_http(server: Server) -> None:
    before = server.complete(PROMPTS[1])
    server.rpc("reload_weights", weights_path=MODEL)
    assert server.complete(PROMPTS[1]) == before
    report = json.loads(server.rpc("twinweight_report", check="yes")[0])
    assert all(twin["exact"] for twin in report["twins"].values())
