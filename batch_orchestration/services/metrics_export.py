"""Hands metrics out: as text, as a file for node exporter, and over HTTP."""

import os
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.services.metrics import MetricsCollector

#: Node exporter runs as another user.
_READABLE_BY_ALL = 0o644


def metrics_text(folder: DataFolder) -> bytes:
    """Return one page in Prometheus's text format."""
    return generate_latest(_registry(folder))


def write_textfile(folder: DataFolder, path: Path) -> None:
    """Write a page for node exporter's textfile collector; readers see the old one or the new one.

    Raises:
        StorageError: It cannot be written; a page that was there stays.
    """
    page = metrics_text(folder)
    with atomic_writer(path) as file:
        os.fchmod(file.fileno(), _READABLE_BY_ALL)
        file.write(page)


def serve_metrics(
    folder: DataFolder, *, host: str, port: int
) -> tuple[WSGIServer, threading.Thread]:
    """Begin to answer scrapes, each with the state of that moment; return server and thread.

    Raises:
        OSError: The address is taken or not ours.
    """
    return start_http_server(port, addr=host, registry=_registry(folder))


def _registry(folder: DataFolder) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(folder))
    return registry
