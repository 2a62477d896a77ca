"""`mpq serve`: the tokens of `mpq generate` over HTTP, from a process of its own, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from mpq_kernels.cli import serve

MISSING = [name for name in serve.NEEDED if serve.find_spec(name) is None]
PROMPT = "The old man"
# The prompt as it is: what `mpq generate` continues.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, path, **body):
    """The answer to a request; without a body, to a GET."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read())


class Server:
    """A process that serves a directory."""

    def __init__(self, directory, *words):
        self.port = free_port()
        command = [sys.executable, "-m", "mpq_kernels", "serve", str(directory), "--host", "127.0.0.1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self, seconds=120):
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(self.process.stdout.read())
            try:
                return ask(self.port, "/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.mark.skipif(os.environ.get("MPQ_TEST_EXPORT") != "1", reason="a minute of servers: make test-export")
@pytest.mark.skipif(bool(MISSING), reason=f"without {', '.join(MISSING)}: {serve.INSTALL}")
def test_requests_get_the_tokens_of_generate(run, space):
    expected = run("generate", "mixed", "--prompt", PROMPT, "--max-new-tokens", 7, "--json").json()
    settings = json.loads((space / "mixed" / "tokenizer_config.json").read_text())
    (space / "mixed" / "chat_template.jinja").write_text(TEMPLATE)
    servers = [Server(space / "mixed"), Server(space / "mixed", "--continuous-batching", "--cache-tokens", "1024")]
    try:
        for server in servers:
            server.wait()
            # Each request limits its answer in the way of its endpoint.
            chat = ask(
                server.port, "/v1/chat/completions", max_tokens=7, temperature=0,
                messages=[{"role": "user", "content": PROMPT}],
            )  # fmt: skip
            assert chat["choices"][0]["message"]["content"] == expected["text"]
            assert chat["usage"]["completion_tokens"] == expected["new_tokens"]
            plain = ask(
                server.port, "/v1/completions", model=str(space / "mixed"), max_tokens=7, temperature=0, prompt=PROMPT
            )
            assert plain["choices"][0]["text"] == expected["text"]
    finally:
        for server in servers:
            server.stop()
        (space / "mixed" / "chat_template.jinja").unlink()
    assert json.loads((space / "mixed" / "tokenizer_config.json").read_text()) == settings


def test_a_missing_extra_is_said_in_words(run, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    refused = run("serve", "mixed", code=1)
    assert refused.err == "mpq: mpq serve needs fastapi, uvicorn, openai: pip install 'mpq_kernels[serve]'\n"


def test_refusals(run, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    assert "is not a directory" in run("serve", "nowhere", code=1).err
    assert "--compile or --continuous-batching" in run.misuse("serve", "mixed", "--compile", "--continuous-batching")
    assert "--cache-tokens goes with" in run.misuse("serve", "mixed", "--cache-tokens", 512)
    assert "needs no backend" in run("serve", "dense", "--backend", "cpu", code=1).err
