"""An exported model under ``transformers serve``, asked by the client of another package; loopback alone."""

import concurrent.futures
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from ports import free_port

pytest.importorskip("transformers")
pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai

from depthmix.checkpoint import load_model
from depthmix.generation import generate

pytestmark = pytest.mark.hf

ROOT = Path(__file__).parents[2]
SEQ_LEN = 48


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    """``(run, folder, client)``."""
    run, folder = exported("mgr-competitive")
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "depthmix.hf", "serve", str(folder), "--host", "127.0.0.1"]
    with open(log, "w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=out, stderr=out
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=2
        )
        yield run, folder, client
    finally:
        server.terminate()
        server.wait(timeout=60)


def by_hand(run, prompt: str, tokens: int) -> str:
    model, _ = load_model(run)
    ids = torch.tensor([[*prompt.encode()]])
    found = [int(t) for t in generate(model, ids, tokens, temperature=0, end_token=256, vocab_size=257)]
    return bytes(t for t in found if t < 256).decode(errors="replace")


def ask(served, prompt, **options):
    _, folder, client = served
    return client.completions.create(
        model=str(folder), prompt=prompt, max_tokens=10, temperature=0, **options
    )


def test_completion_is_the_runs(served):
    answer = ask(served, "def main(")
    assert answer.choices[0].text == by_hand(served[0], "def main(", 10)
    assert answer.usage.prompt_tokens == 9 and answer.choices[0].finish_reason in ("stop", "length")


def test_streaming(served):
    chunks = list(ask(served, "def main(", stream=True))
    assert len(chunks) > 1
    assert "".join(c.choices[0].text for c in chunks) == by_hand(served[0], "def main(", 10)


def test_requests_in_parallel(served):
    prompts = ["a", "for x in ", "import os\nimport sys\n", "12345", "ab" * 15]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(lambda p: ask(served, p).choices[0].text, prompts)
    assert list(answers) == [by_hand(served[0], p, 10) for p in prompts]


def test_without_a_number_it_goes_on_to_the_end_of_the_context(served):
    """transformers' own default of 1,024 new tokens is more than this context holds."""
    run, folder, client = served
    answer = client.completions.create(model=str(folder), prompt="def main(", temperature=0)
    assert answer.choices[0].text == by_hand(run, "def main(", SEQ_LEN + 1 - 9)
    assert answer.usage.completion_tokens <= SEQ_LEN + 1 - 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt, options, message",
    [
        (
            "x" * 40,
            {"max_tokens": 10},
            "a prompt of 40 tokens and 10 new ones do not fit the model's context of 48",
        ),
        ("x" * 60, {}, "a prompt of 60 tokens and 1 new ones do not fit the model's context of 48"),
        ("x", {"max_tokens": 0}, "at least 1 new token must be asked for"),
    ],
)
def test_what_does_not_fit_is_the_clients_mistake(served, prompt, options, message, stream):
    _, folder, client = served
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(model=str(folder), prompt=prompt, stream=stream, **options)
    assert caught.value.status_code == 400
    assert ask(served, "a").choices[0].text  # and the server lives


def test_a_base_model_does_not_chat(served):
    _, folder, client = served
    with pytest.raises(openai.BadRequestError, match=r"has no chat template.*/v1/completions"):
        client.chat.completions.create(model=str(folder), messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.responses.create(model=str(folder), input="hello")


def test_a_client_that_knows_http_alone(served):
    """A stream of server-sent events, read as it comes."""
    run, folder, client = served
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=300)
    body = {"model": str(folder), "prompt": "def main(", "max_tokens": 10, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("Content-Type").startswith("text/event-stream")
    events = [line[6:] for line in answer.read().decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    assert "".join(c["choices"][0]["text"] for c in chunks) == by_hand(run, "def main(", 10)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body | {"max_tokens": 100}),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    assert (
        answer.status == 400
        and "do not fit the model's context" in json.loads(answer.read())["error"]["message"]
    )
