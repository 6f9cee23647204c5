"""A Ray cluster: one of our own on this machine, or one that is there.

Whoever can connect to a Ray cluster can run any code as its user. Ours listens on loopback alone, and takes a
token that this process makes and only its children know; of others a token is demanded too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from mechdiff_mlflow.errors import MechdiffError

OWN = "own"

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # no reports of nodes either
_REACH_S = 10.0
_SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray takes the address of the machine's network for a node's, on Linux, unless it is to have no cluster."""


@contextlib.contextmanager
def connected(address: str, n_workers: int) -> Iterator[Any]:
    """The module `ray`, connected to `own`, `auto` or `host:port`.

    A cluster of our own has `n_workers` CPUs, and goes when the context ends.

    Raises:
        MechdiffError: Ray is not installed, there is no cluster at the address, or it refuses the token.
    """
    if address not in (OWN, "auto") and not re.fullmatch(r"\[?[0-9A-Za-z_.:-]+\]?:[0-9]{1,5}", address):
        raise MechdiffError(
            f"Address {address[:200]!r} is none of a Ray cluster; pass own, auto, or e.g. 10.0.0.1:6379."
        )
    if importlib.util.find_spec("ray") is None:
        raise MechdiffError(
            "--engine ray needs Ray, which is not installed; pip install 'mechdiff-mlflow[ray]'."
        )
    if "ray" in sys.modules and importlib.import_module("ray").is_initialized():
        yield importlib.import_module("ray")  # the caller's connection, and the caller's to close
        return
    with _environment(_of_our_own() if address == OWN else _of_others(address)):
        ray = importlib.import_module("ray")
        try:
            with _same_sigterm():
                _start(ray, n_workers) if address == OWN else _join(ray, address)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, n_workers: int) -> None:
    # Without an address Ray joins any cluster that runs on this machine, or that RAY_ADDRESS names.
    context = ray.init("local", num_cpus=n_workers, include_dashboard=False, **_SILENT)
    node = context.address_info["node_ip_address"]
    if not ipaddress.ip_address(node).is_loopback:
        raise MechdiffError(
            f"Ray was imported before mechdiff could tell it to stay on this machine and listens on {node}; "
            "start a cluster yourself and pass its --address."
        )


def _join(ray: Any, address: str) -> None:
    if os.environ["RAY_AUTH_MODE"].lower() != "token":
        warnings.warn(
            "RAY_AUTH_MODE is not token: whoever reaches the cluster can run code on it.", stacklevel=2
        )
    try:
        ray.init(address=address, **_SILENT)
    except Exception as error:  # of several kinds, by what is wrong and by version
        reason = " ".join(str(error).split())[:200]
        raise MechdiffError(
            f"There is no Ray cluster at {address} that lets us in ({reason}); check that it runs, with "
            "RAY_AUTH_MODE=token on its nodes and here, and the same token (ray get-auth-token) on all."
        ) from None


def _of_our_own() -> Mapping[str, str]:
    return _QUIET | _LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}


def _of_others(address: str) -> Mapping[str, str]:
    defaults = {"RAY_AUTH_MODE": "token", "RAY_NUM_REDIS_GET_RETRIES": "3"}
    given = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if address == "auto":
        return _QUIET | given
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:  # Ray itself would try for minutes
        with socket.create_connection((host, int(port)), timeout=_REACH_S) as reached:
            is_here = ipaddress.ip_address(reached.getpeername()[0]).is_loopback
    except (OSError, OverflowError) as error:
        raise MechdiffError(
            f"Nobody listens at {address} ({error}); pass the --address that ray start printed on the head."
        ) from None
    return _QUIET | given | (_LOOPBACK if is_here else {})


@lru_cache(maxsize=1)
def _token() -> str:
    """One a process: Ray reads it once."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables for Ray and its processes, and afterwards what was there."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keep who handles SIGTERM: Ray's own handler would end a run without saying how."""
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        if is_main and before is not None:
            signal.signal(signal.SIGTERM, before)
