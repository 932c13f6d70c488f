"""A model behind OpenAI's interface: models, completions, and chat completions."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web

from smol.errors import UserError
from smol.evaluation.language_model import LanguageModel
from smol.generation.chat import chat_prompt, split_reasoning
from smol.generation.engine import Generator, Stream
from smol.generation.sampling import Sampling

# Names of our settings by those of a request.
SETTINGS = {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "stop", "stop_ids", "seed")
}
SETTINGS |= {"repetition_penalty": "repetition_penalty", "max_tokens": "max_new_tokens"}
SETTINGS |= {"max_completion_tokens": "max_new_tokens", "stop_token_ids": "stop_ids"}


class Server:
    """Answers requests one after another, as there is one cache.

    Args:
        generator: Writes.
        model: Its tokenizer and chat template.
    """

    def __init__(self, generator: Generator, model: LanguageModel) -> None:
        self.generator, self.model = generator, model
        self.turn = asyncio.Lock()
        self.app = web.Application()
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_post("/v1/completions", self.completions)
        self.app.router.add_post("/v1/chat/completions", self.chat)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": self.model.name, "object": "model"}]}
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _answer(self, request: web.Request, chat: bool) -> web.StreamResponse:
        try:
            body = await request.json()
            prompt, opened, sampling = self._read(body, chat)
            stream = self.generator.stream(prompt, sampling)
        except (UserError, ValueError, TypeError, KeyError) as error:
            message = str(error) if isinstance(error, UserError) else f"bad request: {error!r}"
            error = {"message": message, "type": "invalid_request_error"}
            return web.json_response({"error": error}, status=400)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
        }
        if body.get("stream"):
            return await self._send_pieces(request, stream, opened, head, chat)
        async for _ in self._pieces(stream):
            pass
        done = stream.completion
        content = _content(opened + done.text, chat) | ({"role": "assistant"} if chat else {})
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(done.tokens)}
        usage = {"usage": counts | {"total_tokens": sum(counts.values())}}
        answer = head | _choice(content, done.finish_reason, chat, "message") | usage
        return web.json_response(answer)

    async def _send_pieces(
        self, request: web.Request, stream: Stream, opened: str, head: dict[str, Any], chat: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if chat:
            head["object"] += ".chunk"
        sent = _content("", chat)
        with suppress(ConnectionResetError):  # the client has gone
            async with aclosing(self._pieces(stream)) as pieces:
                async for written in pieces:
                    content = _content(opened + written, chat)
                    delta = {key: text[len(sent[key]) :] for key, text in content.items()}
                    sent = content
                    if any(delta.values()):
                        await _send(response, head | _choice(delta, None, chat, "delta"))
            end = _choice({}, stream.completion.finish_reason, chat, "delta")
            await _send(response, head | end)
            await response.write(b"data: [DONE]\n\n")
        return response

    def _read(self, body: dict[str, Any], chat: bool) -> tuple[list[int], str, Sampling]:
        """Prompt, what it has begun of the answer, and settings of a request."""
        if body.get("n", 1) != 1:
            raise UserError(f"n is {body['n']}, expected 1.")
        # Where a request is silent, OpenAI's defaults.
        values = {"temperature": 1.0, "seed": time.time_ns() % 2**32}
        values |= {SETTINGS[k]: v for k, v in body.items() if k in SETTINGS and v is not None}
        template = self.model.template
        if not chat:
            prompt = body["prompt"]
            if isinstance(prompt, str):
                prompt = [*self.model.begin, *self.model.tokenizer.encode(prompt)]
            return prompt, "", Sampling(**values)
        if template is None:
            raise UserError("the model has no chat template; expected /v1/completions.")
        values["stop_ids"] = (*values.get("stop_ids", ()), template.stop_id)
        variables = body.get("chat_template_kwargs") or {}
        prompt, opened = chat_prompt(
            template, body["messages"], tools=body.get("tools"), **variables
        )
        return prompt, opened, Sampling(**values)

    async def _pieces(self, stream: Stream) -> AsyncIterator[str]:
        """What is written so far, again and again; the work is done in another thread."""
        loop, queue, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def work() -> None:
            try:
                written = ""
                for piece in stream:
                    if left.is_set():
                        return
                    written += piece
                    loop.call_soon_threadsafe(queue.put_nowait, written)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        async with self.turn:
            working = loop.run_in_executor(None, work)
            try:
                while (written := await queue.get()) is not None:
                    yield written
            finally:  # also if the client has gone
                left.set()
                await working


def _content(text: str, chat: bool) -> dict[str, str]:
    if not chat:
        return {"text": text}
    reasoning, answer = split_reasoning(text)
    return {"content": answer, "reasoning_content": reasoning or ""}


def _choice(content: dict[str, str], reason: str | None, chat: bool, name: str) -> dict[str, Any]:
    content = {name: content} if chat else {"text": "", **content}
    return {"choices": [{"index": 0, "finish_reason": reason, **content}]}


async def _send(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(content)}\n\n".encode())
