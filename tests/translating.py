"""An endpoint that translates, on this machine: it answers from installed catalogues and misbehaves as real ones do."""

import collections
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conan_engine import languages
from conan_engine.data.sources import catalogues


def known_messages():
    """{English: {language: foreign}} of messages that all these languages have and that no check doubts."""
    found = {}
    for m in catalogues.read(("django", "wagtail")):
        if m.language in ("de", "fr", "ja", "ru") and not languages.problem(m.foreign, m.english, m.language):
            found.setdefault(m.english, {})[m.language] = m.foreign
    return {english: by for english, by in found.items() if len(by) == 4}


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, messages):
        super().__init__(("127.0.0.1", 0), Handler)
        self.messages, self.lock = messages, threading.Lock()
        self.first, self.always, self.delay = {}, {}, 0.0  # query -> how it misbehaves, once or whenever asked
        self.asked = collections.Counter()
        self.answered = collections.Counter()
        self.keys = set()
        self.now = 0
        self.most = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, headers=(), cut=0):
        data = body.encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        if cut:
            self.close_connection = True

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (message["content"] for message in body["messages"])
        with server.lock:
            server.keys.add(self.headers.get("Authorization"))
            server.asked[user] += 1
            how = server.always.get(user) or server.first.pop(user, None)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.delay)
            assert self.path == "/v1/chat/completions" and body["model"] == "mine"
            self.answer(how, user, next(code for code, name in languages.NAMES.items() if f" into {name}," in system))
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, how, user, language):
        if how in ("429", "500"):
            return self.send(int(how), '{"error": "later"}', [("Retry-After", "0.1")] if how == "429" else [])
        if how == "401":
            return self.send(401, '{"error": "no such key"}')
        if how == "html":
            return self.send(200, "<html>gateway</html>")
        if how == "slow":
            time.sleep(3)
        said = json.dumps({"translation": self.server.messages[user][language]}, ensure_ascii=random.random() < 0.5)
        content = {
            "polite": f"Sure! Here is {{your}} translation:\n```json\n{said}\n```\nAnything else?",
            "garbage": "I cannot translate this.", "empty": '{"translation": " "}',
            "copy": json.dumps({"translation": user}),
            "script": json.dumps({"translation": "भाषा बदलें और पुनः प्रयास करें"}), "null": None,
            "half": json.dumps({"translation": f"{user}ä \ud83d"}),
        }.get(how, said)  # fmt: skip
        answer = {
            "choices": [{"message": {"content": content}, "finish_reason": "length" if how == "cut off" else "stop"}],
            "usage": {"prompt_tokens": 50, "completion_tokens": 7},
        }
        with self.server.lock:
            self.server.answered[user] += how != "broken"
        self.send(200, json.dumps(answer), cut=20 if how == "broken" else 0)
