"""Addresses of Ray clusters: what is one, and every way in which a cluster is not there or not ours, in one line."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from vptq.errors import ConfigError
from vptq.quantize import ray_address
from vptq.quantize.ray_address import checked_address, try_address


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["auto", "local", "head:6379", "10.0.0.1:6379", "[::1]:6379"])
def test_addresses(address: str) -> None:
    assert checked_address(address) == address


@pytest.mark.parametrize("address", ["", "head", "head:", ":6379", "ray://head:10001", "head:port", "http://head:1"])
def test_what_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--ray is .*give auto, local, or HOST:PORT"):
        checked_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    if address:
        with pytest.raises(ConfigError, match=r"^--ray is auto \(RAY_ADDRESS=.*give auto, local, or HOST:PORT"):
            checked_address("auto")


def test_auto_is_what_ray_address_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert checked_address("auto") == "head:6379"
    assert checked_address("other:6379") == "other:6379"
    assert checked_address("local") == "local"


def test_where_nothing_listens_no_time_is_lost(listening: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"^--ray 127.0.0.1:{port}: nothing answers there \(Connection refused\)$"):
        try_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("gcs_client.cc:210: RPC error: InvalidAuthToken: Authentication token is missing", "RAY_AUTH_MODE=token"),
        ("ray.exceptions.AuthenticationError: no authentication token was found", "RAY_AUTH_TOKEN"),
        (
            "RuntimeError: Version mismatch: The cluster was started with:\\n    Ray: 2.59.0\\n    Python: 3.12.1\\n",
            "must be the same on all nodes: The cluster was started with: Ray: 2.59.0 Python: 3.12.1$",
        ),
        ("ConnectionError: Could not find any running Ray instance. Please", "ray start --head"),
        ("Traceback\\nConnectionError: something else", "ConnectionError: something else$"),
    ],
)
def test_what_ray_says_is_one_line(listening: str, monkeypatch: pytest.MonkeyPatch, told: str, message: str) -> None:
    monkeypatch.setattr(ray_address, "TRY", f'import sys; sys.exit("{told}")')
    with pytest.raises(ConfigError, match=message) as caught:
        try_address(listening)
    assert str(caught.value).startswith(f"--ray {listening}: ")
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_what_is_no_cluster(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "TRY", "import time; time.sleep(60)")
    monkeypatch.setattr(ray_address, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"no answer in 0\.2 s"):
        try_address(listening)


def test_a_cluster_that_takes_us_in(
    listening: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_address, "TRY", 'import sys; print("noise", file=sys.stderr)')
    try_address(listening)
    assert capfd.readouterr() == ("", "")
