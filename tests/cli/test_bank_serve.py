"""`memjax bank serve` as a user starts and ends it. What it serves: tests/serve."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.test_cli import QUESTION, assert_refused, corpus, models, run  # noqa: F401
from tests.serve.bench import make_bank


def test_refused_before_anything_is_loaded(run, monkeypatch):  # noqa: F811
    serve = ("bank", "serve", "none.bank")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert_refused(run(*serve, "--port", port), f"--port {port}: 127.0.0.1:{port}: another program listens there")
    assert_refused(run(*serve, "--port", 65536), "--port is 65536, needs 0 to 65535")
    assert_refused(run(*serve, "--port", 0, "--host", "no such host"), "--host 'no such host': ")
    assert_refused(run(*serve, "--port", 0, "--passages", 0), "--passages is 0")
    assert_refused(run(*serve, "--port", 0), "none.bank/manifest.json: No such file")
    for missing in ("uvicorn", "starlette"):
        with monkeypatch.context() as patch:
            for name in [n for n in sys.modules if n.startswith(("memjax.serve", "uvicorn", "starlette"))]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, missing, None)
            assert_refused(run(*serve), "bank serve: needs starlette and uvicorn: pip install 'memjax[serve]'")


def test_a_window_without_room_for_the_passages(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    texts = {f"{i}.txt": f"{i} a text that fills a document of its own, as long as it may be" for i in range(8)}
    bank = make_bank(tmp_path, texts)
    assert_refused(run("bank", "serve", bank, "--port", 0, "--passages", 6), "answer: question, passages and answer")


@pytest.mark.slow
def test_its_exit_status_says_that_it_was_refused():
    command = [sys.executable, "-m", "memjax", "bank", "serve", "none.bank", "--port", "65536"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: --port is 65536, needs 0 to 65535\n"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
def test_from_start_to_ctrl_c(tmp_path, host):
    bank = make_bank(tmp_path)
    command = [sys.executable, "-m", "memjax", "bank", "serve", bank, "--port", "0", "--host", host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not (found := re.search(r"http://\S+:\d+", line := process.stdout.readline())):
                assert line, process.stderr.read()
                lines.append(line)
            assert any("texts.bank: 3 documents, " in line and "; ready after " in line for line in lines)
            assert any("whoever reaches 0.0.0.0 can ask" in line for line in lines) == (host == "0.0.0.0")
            request = urllib.request.Request(
                f"{found[0]}/api/ask", json.dumps({"question": QUESTION}).encode(), {"Content-Type": "application/json"}
            )
            assert len(json.load(urllib.request.urlopen(request, timeout=60))["passages"]) == 2
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "stopped\n", "")
