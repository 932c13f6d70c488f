"""The server, asked by a real client over HTTP."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from chat_parts import SRC, folder, load_decoder_of  # noqa: F401 (a fixture)

from smol.data.chat import load_chat_template
from smol.data.tokenizer import load_tokenizer
from smol.generation import Generator, Sampling

SETTINGS = {"temperature": 0.9, "max_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def server(folder: Path):
    """Address of a server, which ends cleanly when it is told to."""
    command = [sys.executable, SRC / "serve.py", folder, "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        pytest.fail(process.stderr.read())
    yield found[0]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def post(url: str, **body) -> list[str]:
    """The lines of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode().splitlines()


def expected(folder: Path, prompt, **settings):
    tokenizer = load_tokenizer(folder)
    sampling = Sampling(0.9, max_new_tokens=8, seed=3, **settings)
    [completion] = Generator(load_decoder_of(folder), tokenizer).generate([prompt], sampling)
    return completion


def events(lines: list[str]) -> list[dict]:
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_completions_whole_and_in_pieces(server, folder):
    [line] = post(f"{server}/v1/completions", prompt="the cat", **SETTINGS)
    answer = json.loads(line)
    prompt = load_tokenizer(folder).encode("the cat")
    completion = expected(folder, prompt)
    assert answer["choices"][0]["text"] == completion.text
    assert answer["choices"][0]["finish_reason"] == completion.finish_reason
    assert answer["usage"]["completion_tokens"] == len(completion.tokens)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    chunks = events(post(f"{server}/v1/completions", prompt="the cat", stream=True, **SETTINGS))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == completion.text
    assert chunks[-1]["choices"][0]["finish_reason"] == completion.finish_reason
    assert len(chunks) > 2


def test_chat_completions_whole_and_in_pieces(server, folder):
    messages = [{"role": "user", "content": "the cat"}]
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}, **SETTINGS}
    [line] = post(f"{server}/v1/chat/completions", messages=messages, **kwargs)
    template = load_chat_template(folder)
    prompt = template.encode(messages, mode="no_think", add_generation_prompt=True).tokens
    completion = expected(folder, prompt, stop_ids=(template.stop_id,))
    message = json.loads(line)["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", completion.text.strip())
    chunks = events(post(f"{server}/v1/chat/completions", messages=messages, stream=True, **kwargs))
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == completion.text.strip()


def test_a_client_that_leaves_does_not_keep_the_server(server):
    url = f"{server}/v1/completions"
    body = {"prompt": "the cat", "stream": True, "max_tokens": 1900, "temperature": 0}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
        response.readline()
    assert post(url, prompt="a dog", max_tokens=2)


def test_models_and_mistakes(server):
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as response:
        assert json.load(response)["data"][0]["id"] == "chat"
    for place, body, message in [
        ("completions", {"prompt": "a", "top_p": 3}, "top_p is 3, expected 0 < top_p <= 1"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "bad request"),
        ("chat/completions", {"messages": [{"role": "cat", "content": "a"}]}, "the role 'cat'"),
        ("chat/completions", {"messages": [], "n": 2}, "n is 2, expected 1"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{server}/v1/{place}", **body)
        assert caught.value.code == 400
        assert message in json.load(caught.value)["error"]["message"]
