"""A bank behind HTTP: what it answers, what it refuses, and how it follows a bank that changes under it."""

import contextlib
import http.client
import json
import shutil
import socket
import threading

import anyio
import jax
import pytest
from starlette.testclient import TestClient

from memjax.in_storage.bank_files import compact, delete_files
from memjax.lm.asking import ask, open_with_model, word_index
from memjax.serve import bank as served
from memjax.serve import guard, known_hosts, make_app
from tests.lm import tiny
from tests.serve.bench import TEXTS, build, make_bank, serve, server

MARKUP = sorted(TEXTS)[1]
LOOPBACK = known_hosts("127.0.0.1")
HERE = "http://127.0.0.1:8000"
QUESTION = "Which number belongs to the red house?"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A bank that no test changes."""
    return make_bank(tmp_path_factory.mktemp("shared"))


@contextlib.contextmanager
def client(bank, hosts=LOOPBACK, **options):
    with TestClient(make_app(serve(bank), hosts), base_url=HERE, **options) as client:
        yield client


@pytest.fixture(scope="module")
def web(shared):
    with client(shared) as web:
        yield web


def refused(response, status, *parts):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    for part in parts:
        assert part in response.json()["error"]
    return response.json()


# ---------------------------------------------------------------------------------------------- answers


def test_an_answer_as_one_object(web, shared):
    found = web.post("/api/ask", json={"question": QUESTION}).json()
    assert set(found) == {"passages", "routing", "answer", "first_word_seconds", "seconds"}

    asked = ask(*open_with_model(shared), QUESTION, same_shapes=True)
    assert [(p["document"], p["citation"]) for p in found["passages"]] == [
        (p.number, p.document.citation) for p in asked.passages
    ]
    assert [p["score"] for p in found["passages"]] == pytest.approx([p.score for p in asked.passages], abs=1e-6)
    assert found["answer"] == "".join(asked.answer)
    assert found["seconds"] >= (found["first_word_seconds"] or 0) > -1

    (scores,), documents = found["routing"]["scores"], found["routing"]["documents"]
    assert sorted(d["citation"] for d in documents) == ["a.txt:1-2", f"{MARKUP}:1-2", "sub/c.txt:1-2"]
    assert scores == sorted(scores, reverse=True)
    chosen = dict(zip(asked.routing.documents[0, 0].tolist(), asked.routing.scores[0, 0].tolist(), strict=True))
    assert {d["document"]: s for d, s in zip(documents, scores, strict=True)} == pytest.approx(chosen, abs=1e-6)


def test_passages_show_their_file_lines_and_words(web):
    passages = web.post("/api/ask", json={"question": QUESTION}).json()["passages"]
    routing = web.post("/api/ask", json={"question": "house " * 3}).json()["routing"]
    by_file = {p["file"]: p for p in passages}
    assert len(passages) == 2 and by_file.keys() < TEXTS.keys()
    for name, passage in by_file.items():
        assert passage["text"].strip() == TEXTS[name].strip()[: len(passage["text"].strip())]
        assert (passage["first_line"], passage["last_line"]) == (1, 2)
        marked = [piece["text"] for piece in passage["excerpt"] if piece["marked"]]
        assert marked == {"a.txt": ["house", "number"], MARKUP: ["house"], "sub/c.txt": []}[name]
    assert {d["file"] for d in routing["documents"]} == TEXTS.keys()


def test_a_streamed_answer_is_lines(web):
    whole = web.post("/api/ask", json={"question": QUESTION}).json()
    response = web.post("/api/ask", json={"question": QUESTION, "stream": True})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.isascii()
    first, *texts, end = map(json.loads, response.text.splitlines())
    assert first == {"type": "found", "passages": whole["passages"], "routing": whole["routing"]}
    assert {t["type"] for t in texts} <= {"text"} and "".join(t["text"] for t in texts) == whole["answer"]
    assert set(end) == {"type", "first_word_seconds", "seconds"} and end["type"] == "end"


def test_words_choose_the_passages_too(shared):
    bank = serve(shared, words=True)
    found = next(bank.ask("a folder of its own"))
    loaded, opened = open_with_model(shared)
    want = ask(loaded, opened, "a folder of its own", words=word_index(loaded, opened))
    assert [p["citation"] for p in found["passages"]] == [p.document.citation for p in want.passages]
    assert [p["score"] for p in found["passages"]] == pytest.approx([p.score for p in want.passages], abs=1e-6)
    assert {p["file"]: p["score"] for p in found["passages"]}["sub/c.txt"] > 1 / 61  # found by both
    chosen = tiny.FIELDS["top_k"]  # of a deeper ranking, what the layer chose is shown
    assert sum(score is not None for score in found["routing"]["scores"][0]) == min(chosen, len(TEXTS))


def test_a_layer_that_did_not_choose_a_document_scores_it_null(shared):
    bank = serve(shared)
    bank.about()
    routing = ask(*open_with_model(shared), QUESTION, same_shapes=True).routing
    two = routing._replace(
        documents=routing.documents[[0, 0]][:, :, :2].copy(), scores=routing.scores[[0, 0]][:, :, :2].copy()
    )
    two.documents[1, 0] = [routing.documents[0, 0, 2], -1]
    two.scores[1, 0] = [9.0, -float("inf")]
    shown = bank._routing(two)
    columns = [d["document"] for d in shown["documents"]]
    assert sorted(columns) == [0, 1, 2]
    layers = [dict(zip(columns, row, strict=True)) for row in shown["scores"]]
    best, second, third = routing.documents[0, 0].tolist()
    assert layers[0] == {best: two.scores[0, 0, 0], second: two.scores[0, 0, 1], third: None}
    assert layers[1] == {best: None, second: None, third: 9.0}


def test_another_question_compiles_nothing(shared):
    compiled = []

    def listen(event, _, **__):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    bank = serve(shared)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(1)
        assert compiled
        bank.warm_up()
        del compiled[:]
        for length in (20, 40, 60):
            assert list(bank.ask("x" * length))[-1]["type"] == "end"
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_about(web, shared):
    about = web.get("/api/bank").json()
    tokens = sum(len(text.encode()) for text in TEXTS.values())
    assert about.pop("tokens") in range(tokens - 3, tokens + 1)  # newlines at the end belong to no document
    assert about == {
        "bank": "texts.bank",
        "documents": 3,
        "layers": 1,
        "passages": 2,
        "model": open_with_model(shared)[0].hash[:12],
    }


def test_the_page_may_do_nothing_but_ask(web):
    response = web.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "innerHTML" not in response.text and "://" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in response.headers
    assert web.head("/").status_code == 200


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("body", "status", "field", "said"),
    [
        (b"", 400, "body", "body: is not JSON"),
        (b'{"question": "a"', 400, "body", "body: is not JSON"),
        (b"\xff\xfe\xff", 400, "body", "body: is not JSON"),
        (b"[" * 60_000, 400, "body", "body: is not JSON"),
        (b'["a"]', 422, "body", "body: is a list, needs an object"),
        (b"{}", 422, "question", "question: is null, needs a text"),
        (b'{"question": 7}', 422, "question", "question: is 7, needs a text"),
        (b'{"question": ""}', 422, "question", "question: is empty"),
        (b'{"question": " \\n"}', 422, "question", "question: is empty"),
        (b'{"question": "\\ud800"}', 422, "question", "half of a surrogate pair"),
        (b'{"question": "a", "stream": 1}', 422, "stream", "stream: is 1, needs true or false"),
        (b'{"question": "a", "top": 1}', 422, "top", "top: is unknown; there are question, stream"),
        (
            json.dumps({"question": "why " * 96}).encode(),
            422,
            "question",
            "question: has 385 tokens, the model's window is 384",
        ),
    ],
)
def test_a_question_that_cannot_be_asked(web, body, status, field, said):
    response = web.post("/api/ask", content=body, headers={"Content-Type": "application/json"})
    assert refused(response, status, said)["field"] == field


def test_paths_methods_and_types(web):
    for path in ("/nowhere", "/api", "/api/ask/", "/page.html", "/../pyproject.toml", "/%2e%2e/etc/passwd"):
        refused(web.get(path), 404, "Not Found")
    refused(web.get("/api/ask"), 405)
    assert web.get("/api/ask").headers["allow"] == "POST"
    refused(web.post("/"), 405)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused(web.post("/api/ask", content=b'{"question": "a"}', headers={"Content-Type": kind}), 415, kind)
    refused(web.post("/api/ask", content=b'{"question": "a"}'), 415, "Content-Type: is '', needs application/json")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "[", "10.0.0.1", "user@evil"])
def test_an_unknown_host_is_refused(web, host):
    for path in ("/", "/api/bank"):
        refused(web.get(path, headers={"Host": host}), 421, f"Host: is {host!r}, needs one of 127.0.0.1, ::1, localh")


def test_known_hosts(web, shared):
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000"):
        assert web.get("/api/bank", headers={"Host": host}).status_code == 200
    refused(web.get("/api/bank", headers={"Host": "192.168.1.7:8000"}), 421, "needs one of")
    with client(shared, hosts=known_hosts("0.0.0.0", "My.Machine")) as anyone:
        for host in ("my.machine:8000", "192.168.1.7:8000", "[fe80::1]:8000", socket.gethostname()):
            assert anyone.get("/api/bank", headers={"Host": host}).status_code == 200
        # the name of another site may be made to resolve to this machine
        refused(anyone.get("/api/bank", headers={"Host": "evil.example"}), 421, "needs one of 0.0.0.0, 127.0.0.1")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": HERE, "Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_is_refused(web, headers):
    response = web.post("/api/ask", json={"question": QUESTION}, headers=headers)
    refused(response, 403, "needs this site")
    preflight = web.options("/api/ask", headers={"Access-Control-Request-Method": "POST", **headers})
    assert preflight.status_code in (403, 405) and "access-control-allow-origin" not in preflight.headers


def test_its_own_page_is_not(web):
    headers = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert web.post("/api/ask", json={"question": QUESTION}, headers=headers).status_code == 200


# ---------------------------------------------------------------------------------------------- bodies, over a socket


@pytest.fixture(scope="module")
def port(shared):
    with server(shared) as port:
        yield port


def post(port, body, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", "/api/ask", body, headers, encode_chunked="Transfer-Encoding" in headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def megabytes(n, sent):
    for _ in range(n):
        sent.append(1)
        yield b"x" * 1_000_000


@pytest.mark.parametrize("declared", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_of_100_megabytes_is_refused_and_never_held(port, declared):
    before, sent = resident(), []
    headers = {"Content-Length": "100000000"} if declared else {"Transfer-Encoding": "chunked"}
    status, said = post(port, megabytes(100, sent), **headers)
    assert (status, said) == (413, {"error": "body: is larger than 65,536 bytes"})
    assert len(sent) == 100  # the client was not cut off while it was sending
    assert resident() - before < 20e6
    assert post(port, json.dumps({"question": QUESTION}))[0] == 200


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_the_largest_body(port):
    body = json.dumps({"question": "why"}).encode()
    assert post(port, body + b" " * (guard.LIMIT - len(body)))[0] == 200
    assert post(port, body + b" " * (guard.LIMIT - len(body) + 1))[0] == 413


def test_a_client_that_asks_before_it_sends_hears_at_once(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/api/ask")
        connection.putheader("Content-Length", "100000000")
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.getresponse().status == 413


def test_a_body_that_does_not_arrive(port, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/api/ask")
        connection.putheader("Content-Length", "10")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408


# ---------------------------------------------------------------------------------------------- many at once


def test_questions_are_answered_one_after_the_other_and_the_loop_goes_on(shared, monkeypatch):
    running, most, started, go = [], [], threading.Event(), threading.Event()
    real = served.ask

    def slow(*arguments, **options):
        running.append(1)
        most.append(len(running))
        started.set()
        assert go.wait(60)
        asked = real(*arguments, **options)
        running.pop()
        return asked

    monkeypatch.setattr(served, "ask", slow)
    with client(shared) as web:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(web.post("/api/ask", json={"question": QUESTION})))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert started.wait(60)
        assert web.get("/").status_code == 200  # while a question is computed
        go.set()
        for thread in threads:
            thread.join()
    assert most == [1, 1, 1] and [r.status_code for r in results] == [200] * 3
    assert len({r.json()["answer"] for r in results}) == 1


def test_who_has_gone_is_not_answered(shared, monkeypatch):
    asked = []
    monkeypatch.setattr(served, "ask", lambda *a, **o: asked.append(a))
    app = make_app(serve(shared), LOOPBACK)
    scope = {
        "type": "http", "method": "POST", "path": "/api/ask", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": b'{"question": "why"}'}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    anyio.run(app, scope, receive, send)
    assert not asked


# ---------------------------------------------------------------------------------------------- a bank that changes


@pytest.fixture
def own(tmp_path, shared):
    """A bank that a test may change."""
    shutil.copytree(shared.parent, tmp_path / "own")
    return tmp_path / "own" / "texts.bank"


def files_found(web):
    response = web.post("/api/ask", json={"question": QUESTION})
    assert response.status_code == 200, response.text
    return {d["file"] for d in response.json()["routing"]["documents"]}


def test_a_changed_bank_is_opened_anew(own):
    with client(own) as web:
        assert files_found(web) == set(TEXTS)
        delete_files(own, ["sub"])
        assert files_found(web) == {"a.txt", MARKUP}
        assert web.get("/api/bank").json()["documents"] == 2
        compact(own)
        assert files_found(web) == {"a.txt", MARKUP}
        (own.parent / "texts" / "d.txt").write_text("Something else.\n")
        build(own.parent)
        assert web.get("/api/bank").json()["documents"] == 4


def test_a_bank_that_is_compacted_while_it_is_asked(own, monkeypatch):
    delete_files(own, ["sub"])
    real, calls = served.ask, []

    def compacted(loaded, opened, *arguments, **options):
        if not calls:
            compact(own)
        calls.append(opened)
        return real(loaded, opened, *arguments, **options)

    monkeypatch.setattr(served, "ask", compacted)
    with client(own) as web:
        assert files_found(web) == {"a.txt", MARKUP}
    assert len(calls) == 2 and calls[0] is not calls[1]


def test_a_bank_that_is_lost_and_comes_back(own):
    away = own.with_name("away")
    with client(own) as web:
        assert files_found(web) == set(TEXTS)
        own.rename(away)
        for _ in range(2):
            refused(web.post("/api/ask", json={"question": QUESTION}), 503, "texts.bank/manifest.json", "No such file")
        refused(web.get("/api/bank"), 503, "manifest.json")
        assert web.get("/").status_code == 200
        away.rename(own)
        assert files_found(web) == set(TEXTS)


def test_a_damaged_bank(own):
    file = next(own.glob("segment-*/rk/c/0/0/0/0"))
    file.write_bytes(bytes(len(file.read_bytes())))
    with client(own) as web:
        refused(web.post("/api/ask", json={"question": QUESTION}), 503, "rk/c/0/0/0/0")
    shutil.rmtree(own / "model")
    with client(own) as web:
        refused(web.get("/api/bank"), 503, "holds no copy of its model")


def test_an_error_in_mid_answer_is_the_last_line(shared, monkeypatch):
    def broken():
        yield "one "
        raise RuntimeError("a secret")

    real = served.ask
    monkeypatch.setattr(served, "ask", lambda *a, **o: real(*a, **o)._replace(answer=broken()))
    question = {"question": QUESTION, "stream": True}
    with client(shared, raise_server_exceptions=False) as web:
        last = json.loads(web.post("/api/ask", json=question).text.splitlines()[-1])
        assert last == {"type": "error", "error": "internal error; the terminal of the server says more"}
        response = web.post("/api/ask", json={"question": QUESTION})
        assert response.status_code == 500 and "secret" not in response.text
        assert web.get("/api/bank").status_code == 200  # the next one has its turn
