"""Where a Ray cluster is, and whether it takes this process in: asked before any work is done.

At an address where no cluster is, or one that wants another token, Ray waits for minutes and writes to the terminal
meanwhile. So the address is tried by another process, which may.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from vptq.errors import ConfigError

CONNECT_SECONDS = 60
TRY = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"


def checked_address(given: str) -> str:
    """The address that is meant: "local", "auto" or HOST:PORT; ConfigError for any other."""
    address = os.environ.get("RAY_ADDRESS") or given if given == "auto" else given
    host, _, port = address.rpartition(":")
    if address in ("auto", "local") or (host and "/" not in host and port.isdecimal()):
        return address
    said = given if address == given else f"{given} (RAY_ADDRESS={address})"
    raise ConfigError(
        f"--ray is {said}; give auto, local, or HOST:PORT of the head. This machine must be a node of the cluster: "
        "ray start --address HOST:PORT"
    )


def try_address(address: str) -> None:
    """Connects from another process, which Ray may keep waiting, and may write what it likes.

    Raises:
        ConfigError: no cluster is there, or not one that takes this process in.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConfigError(f"--ray {address}: nothing answers there ({error.strerror or error})") from error
    try:
        tried = subprocess.run([sys.executable, "-c", TRY, address], capture_output=True, timeout=CONNECT_SECONDS)
        told = "" if tried.returncode == 0 else tried.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        told = (expired.stderr or b"").decode(errors="replace") + f"\nno answer in {CONNECT_SECONDS} s"
    if told:
        raise ConfigError(f"--ray {address}: {_what_is_wrong(told)}")


def _what_is_wrong(told: str) -> str:
    if "InvalidAuthToken" in told or "AuthenticationError" in told:
        return (
            "the cluster does not accept this process's token; set RAY_AUTH_MODE=token and give the head's token, in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token (on every node the same)"
        )
    if "Version mismatch" in told:
        words = " ".join(told.partition("Version mismatch:")[2].split())
        return f"Ray and Python must be the same on all nodes: {words}"
    if "Could not find any running Ray" in told:
        return (
            "no Ray runs on this machine; make it a node (ray start --head, or ray start --address HOST:PORT), or "
            "give --ray local"
        )
    return told.strip().splitlines()[-1]
