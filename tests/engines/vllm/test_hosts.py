"""One server over two hosts: namespaces of a network, each with its own address and shared memory, as two machines have."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm.jobs import (
    RAY,
    ROOT,
    SIZES,
    Environ,
    Job,
    assert_ranks_alike,
    assert_same_tokens,
    environment,
    flags,
    host,
    needs_kernel,
)
from tests.engines.vllm.models import short

pytestmark = needs_kernel

NAMES = ("twinweight-0", "twinweight-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
MODEL = short(group_size=64)
ON = {"twinweight": {"mode": "soft"}}
MORE: dict[str, Any] = {
    "tensor_parallel_size": 2, "nnodes": 2, "master_addr": ADDRESSES[0], "master_port": 29577,
    "distributed_executor_backend": "mp",
}  # fmt: skip
HEADLESS = (
    "from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser, run_headless; "
    "run_headless(make_arg_parser(FlexibleArgumentParser()).parse_args())"
)
"""`vllm serve --headless`, whose command asks for the version of a package named vllm."""


def within(which: int, *, memory: bool = True) -> tuple[str, ...]:
    """A command before another one, which then runs on a host; memory: with shared memory of its own."""
    enter = ("ip", "netns", "exec", NAMES[which])
    alone = ("unshare", "--ipc", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm; exec "$@"', "sh")
    return (*enter, *alone) if memory else enter


def environ_of(which: int) -> Environ:
    return (("VLLM_HOST_IP", ADDRESSES[which]), ("GLOO_SOCKET_IFNAME", NAMES[which]), ("VLLM_CPU_OMP_THREADS_BIND", str(which)))


def remove_hosts() -> None:
    for name in NAMES:
        with suppress(OSError):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """The hosts and a wire between them; a machine may not allow it."""
    first, second = NAMES
    made = [
        *(["netns", "add", name] for name in NAMES),
        ["link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second],
        *(["-n", name, "addr", "add", f"{address}/24", "dev", name] for name, address in zip(NAMES, ADDRESSES, strict=True)),
        *(["-n", name, "link", "set", device, "up"] for name in NAMES for device in ("lo", name)),
    ]
    remove_hosts()  # of a run that was interrupted
    try:
        for command in made:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        subprocess.run([*within(0), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs ip (iproute2) and the right to make network namespaces: {error}")
    else:
        yield
    finally:
        remove_hosts()


@pytest.fixture(scope="module")
def job(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Job of the first host, while the second runs its rank; without that the first does not wait."""
    found = Job(MODEL, json.dumps(ON), more=json.dumps(MORE | {"node_rank": 0}), environ=environ_of(0), within=within(0))
    command = [
        *within(1), sys.executable, "-c", HEADLESS, "--model", MODEL, "--headless", "--api-server-count=1", "--enforce-eager",
        "--skip-tokenizer-init", "--no-enable-prefix-caching", "--disable-log-stats", "--additional-config", found.additional,
        *flags({**MORE, **SIZES, "node_rank": 1, "seed": 0}),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("hosts") / "log"
    with log.open("w") as out:
        first = host(found.environ, found.within).process
        second = subprocess.Popen(command, env=environment(environ_of(1)), cwd=ROOT, stdout=out, stderr=out)

        def follow() -> None:
            second.wait()
            first.kill()

        threading.Thread(target=follow, daemon=True).start()
        try:
            yield found
        finally:
            second.terminate()
            second.wait()


@pytest.fixture(scope="module")
def ray_job(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The same on a cluster of Ray, under which vLLM's ranks on CPUs expect to share memory."""
    ray, address = str(Path(sys.executable).with_name("ray")), f"{ADDRESSES[0]}:6379"
    more = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    given, log = (*environ_of(0), *RAY, ("RAY_ADDRESS", address)), tmp_path_factory.mktemp("ray") / "log"
    found = Job(MODEL, json.dumps(ON), more=json.dumps(more), environ=given, within=within(0, memory=False))
    # Paths of sockets are short, and where Ray keeps them by default other tests would find this cluster.
    with (
        tempfile.TemporaryDirectory(prefix="ray") as temporary,
        log.open("w") as out,
        ExitStack() as waits,
        ExitStack() as ends,
    ):
        first = ["--head", "--port=6379", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={temporary}"]
        for which, options in enumerate((first, [f"--address={address}"])):
            command = [
                *within(which, memory=False), ray, "start", f"--node-ip-address={ADDRESSES[which]}", "--num-gpus=1",
                "--num-cpus=2", "--object-store-memory=100000000", "--block", *options,
            ]  # fmt: skip
            environ = environment((*environ_of(which), *RAY))
            process = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=out, stderr=out)
            waits.callback(process.wait)
            ends.callback(process.terminate)  # all of them first: each takes six seconds to end
            status = [*found.within, ray, "status", f"--address={address}"]
            for _ in range(30):
                done = subprocess.run(status, capture_output=True, text=True, env=environ, check=False)
                if done.stdout.count(" node_") > which:
                    break
                assert process.poll() is None, log.read_text()[-4000:]
        yield found


@pytest.mark.parametrize("by", ["job", "ray_job"])
def test_ranks_on_two_hosts_plan_alike_and_give_the_tokens_of_one(by: str, request: pytest.FixtureRequest) -> None:
    job = request.getfixturevalue(by)
    assert_ranks_alike(job)
    assert_same_tokens(Job(short()), job)
