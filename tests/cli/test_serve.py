"""The server, asked by a real client over HTTP."""

import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from chat_parts import SRC, folder, load_decoder_of  # noqa: F401 (a fixture)

from smol.data.chat import load_chat_template
from smol.data.tokenizer import load_tokenizer
from smol.evaluation.language_model import load_language_model
from smol.evaluation.model_folder import find_model
from smol.generation import Generator, Sampling
from smol.serving.loading import load_generator
from smol.serving.requests import read_request
from smol.serving.server import Server

SETTINGS = {"temperature": 0.9, "max_tokens": 8, "seed": 3}
CHAT = [{"role": "user", "content": "the cat"}]


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
    body = {"prompt": "the cat", "max_tokens": 1900, "temperature": 0}
    began = time.perf_counter()
    [line] = post(url, **body)
    whole = time.perf_counter() - began
    assert json.loads(line)["usage"]["completion_tokens"] > 1000
    address = server.removeprefix("http://").split(":")
    for stream in (True, False):
        client = http.client.HTTPConnection(*address)
        client.request("POST", "/v1/completions", json.dumps(body | {"stream": stream}))
        time.sleep(whole / 10)
        client.close()
        began = time.perf_counter()
        assert post(url, prompt="a dog", max_tokens=2)
        assert time.perf_counter() - began < whole / 2


def test_messages_as_clients_write_them(server):
    url = f"{server}/v1/chat/completions"
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    both = [
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the\ncat"}],
    ]
    answers = [json.loads(post(url, messages=chat, **SETTINGS)[0]) for chat in both]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"] == answers[1]["usage"]
    chat = [{"role": "system", "content": None}, {"role": "user", "content": "the cat"}]
    neutral = {"logit_bias": {}, "frequency_penalty": 0.0, "n": 1, "user": "me", "top_k": None}
    assert post(url, messages=chat, **SETTINGS, **neutral)
    chunks = events(
        post(url, messages=chat, stream=True, stream_options={"include_usage": True}, **SETTINGS)
    )
    assert chunks[-1]["usage"]["completion_tokens"] <= 8


def test_an_answer_may_take_all_the_room_there_is(folder):
    model = load_language_model(find_model(folder))
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert read_request(chat, model, 999, chat=True).sampling.max_new_tokens == 999
    assert read_request({"prompt": "a"}, model, 999, chat=False).sampling.max_new_tokens == 256


def test_a_failure_on_the_way_is_told(folder):
    generator, model = load_generator(folder, dtype="float32")

    async def ask() -> tuple[list[str], int, dict]:
        async with TestClient(TestServer(Server(generator, model).app)) as client:
            generator._forward, forward = fail, generator._forward
            body = {"prompt": "the cat", "max_tokens": 3}
            pieces = await client.post("/v1/completions", json=body | {"stream": True})
            whole = await client.post("/v1/completions", json=body)
            generator._forward = forward
            after = await client.post("/v1/completions", json=body)
            assert after.status == 200
            return (await pieces.text()).split("\n"), whole.status, await whole.json()

    def fail(*args):
        raise RuntimeError("out of memory")

    lines, status, answer = asyncio.run(ask())
    told = json.loads(lines[0].removeprefix("data: "))
    assert told == answer
    assert (status, told["error"]["message"]) == (500, "RuntimeError: out of memory")


@pytest.mark.parametrize("port", [99999, -1])
def test_a_port_there_is_not_is_one_line(folder, port):
    command = [sys.executable, SRC / "serve.py", folder, "--port", port]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: port is {port}, expected 0 to 65535.\n")


def test_models_and_mistakes(server):
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as response:
        assert json.load(response)["data"][0]["id"] == "chat"
    for place, body, message in [
        ("completions", {"prompt": "a", "top_p": 3}, "top_p is 3, expected 0 < top_p <= 1"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_new_tokens is True"),
        ("completions", {"prompt": "a", "top_k": 2.5, "stream": True}, "top_k is 2.5"),
        ("completions", {"prompt": "a", "stop": ["a", 5]}, "stop is ('a', 5)"),
        ("completions", {"prompt": [1.7, 2]}, "prompt holds 1.7"),
        ("completions", {"prompt": "a", "echo": True}, "echo is True"),
        ("completions", {"prompt": "a", "logprobs": 3}, "logprobs is 3"),
        ("completions", {"prompt": "a", "max_token": 3}, "Did you mean 'max_tokens'?"),
        ("completions", {"prompt": "a", "stream": "yes"}, "stream is 'yes'"),
        ("chat/completions", {"messages": CHAT, "stop_ids": ["2"]}, "stop_ids is ('2',)"),
        ("chat/completions", {"messages": CHAT, "logit_bias": {"5": 9}}, "logit_bias is"),
        ("chat/completions", {"messages": CHAT, "frequency_penalty": 1}, "frequency_penalty is 1"),
        ("chat/completions", {"messages": []}, "messages is empty"),
        ("chat/completions", {"messages": "hi"}, "expected a list of messages"),
        ("chat/completions", {"messages": ["hi"]}, "message 1 is 'hi'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "message 1 has no content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [5]}]}, "holds 5 (int)"),
        ("chat/completions", {"messages": [{"role": "cat", "content": "a"}]}, "the role 'cat'"),
        ("chat/completions", {"messages": [], "n": 2}, "n is 2 (int), expected 1"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(f"{server}/v1/{place}", **body)
        assert caught.value.code == 400
        assert message in json.load(caught.value)["error"]["message"]
    for body in ([], "x", 5, None):
        request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        assert caught.value.code == 400
        assert "expected a JSON object" in caught.value.read().decode()
