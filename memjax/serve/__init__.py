"""A bank behind HTTP: a page for people and JSON for programs (extra `serve`: starlette, uvicorn).

    GET  /          the page
    GET  /api/bank  {"bank", "documents", "tokens", "layers", "passages", "model"}
    POST /api/ask   {"question": "..."} -> {"passages": [...], "routing": {...}, "answer", "first_word_seconds",
                    "seconds"}; with "stream": true the same as lines of JSON, each when it is known:
                    {"type": "found", "passages", "routing"}, then {"type": "text", "text"} several times, then
                    {"type": "end", "first_word_seconds", "seconds"}, or {"type": "error", "error"}

    passage  {"document", "file", "first_line", "last_line", "citation", "score", "text", "excerpt": [{"text",
             "marked"}]}, best first; lines of a PDF are pages
    routing  {"documents": [{"document", "file", "first_line", "last_line", "citation"}], "scores": [[...]]}: all
             documents that any router layer chose, best first, and for each layer their scores, null where not chosen
    error    {"error": "...", "field": "..." where there is one}, with status 400 not JSON, 403 another site's page,
             404, 405, 408 too slow, 413 body over 64 KB, 415 not sent as JSON, 421 unknown Host, 422 a question that
             can't be asked, 503 a bank that can't be read

Questions are answered one after the other; seconds are counted from a question's turn on.
"""

from memjax.serve.app import make_app as make_app
from memjax.serve.bank import ServedBank as ServedBank
from memjax.serve.guard import is_loopback as is_loopback
from memjax.serve.guard import known_hosts as known_hosts
