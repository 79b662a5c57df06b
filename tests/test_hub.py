"""The hub is asked once, for a short time."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from nested_learning import hub
from nested_learning.hub import check_hub


@pytest.fixture
def answering(monkeypatch):
    """A hub on this machine that answers with `answering.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_hub_that_answers_is_there(answering, status):
    answering.status = status
    check_hub("take local files")


def test_a_hub_that_does_not_work_is_refused(answering):
    answering.status = 503
    with pytest.raises(ConnectionError) as error:
        check_hub("take local files")
    assert str(error.value) == (
        f"http://127.0.0.1:{answering.server_port} cannot be reached: HTTP status 503; "
        "take local files, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
    )


def test_a_hub_that_is_not_there_is_refused_unless_offline(no_hub, monkeypatch):
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:\d+ cannot be reached: .*refused"):
        check_hub("take local files")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("take local files")


def test_a_hub_that_is_silent_is_not_waited_for(no_hub, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    monkeypatch.setattr(hub, "_ask", lambda endpoint, answer: None)
    with pytest.raises(ConnectionError, match=r"cannot be reached: no answer in 0.05 s; take"):
        check_hub("take local files")
