"""A model behind OpenAI's interface: models, completions, and chat completions."""

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web

from smol.errors import UserError, one_line
from smol.evaluation.language_model import LanguageModel
from smol.generation.chat import split_reasoning
from smol.generation.engine import Generator, Stream
from smol.serving.requests import Request, read_request

LOG = logging.getLogger(__name__)


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

    async def _answer(self, http: web.Request, chat: bool) -> web.StreamResponse:
        generator = self.generator
        try:
            request = read_request(await http.json(), self.model, generator.max_length, chat)
            stream = generator.stream(request.prompt, request.sampling)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = str(error) if isinstance(error, UserError) else f"bad request: {error!r}"
            return web.json_response(_error(message, "invalid_request_error"), status=400)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
        }
        if request.stream:
            return await self._send_pieces(http, request, stream, head, chat)
        try:
            async with aclosing(self._pieces(stream)) as pieces:
                async for _ in pieces:
                    pass
        except Exception as error:
            LOG.exception("a request failed")
            return web.json_response(_error(one_line(error), "server_error"), status=500)
        done = stream.completion
        content = _content(request.opened + done.text, chat, finished=True)
        content |= {"role": "assistant"} if chat else {}
        choice = _choice(content, done.finish_reason, chat, "message")
        return web.json_response(head | choice | _usage(request, stream))

    async def _send_pieces(
        self,
        http: web.Request,
        request: Request,
        stream: Stream,
        head: dict[str, Any],
        chat: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        if chat:
            head["object"] += ".chunk"
        sent = _content("", chat)

        async def send_rest(written: str, finished: bool) -> None:
            nonlocal sent
            content = _content(request.opened + written, chat, finished)
            delta = {key: text[len(sent[key]) :] for key, text in content.items()}
            sent = content
            if any(delta.values()):
                await _send(response, head | _choice(delta, None, chat, "delta"))

        with suppress(ConnectionResetError):  # the client has gone
            try:
                async with aclosing(self._pieces(stream)) as pieces:
                    async for written in pieces:
                        await send_rest(written, finished=False)
            except ConnectionResetError:
                raise
            except Exception as error:
                LOG.exception("a request failed")
                await _send(response, _error(one_line(error), "server_error"))
            else:
                done = stream.completion
                await send_rest(done.text, finished=True)
                await _send(response, head | _choice({}, done.finish_reason, chat, "delta"))
                if request.usage:
                    await _send(response, head | {"choices": []} | _usage(request, stream))
                await response.write(b"data: [DONE]\n\n")
        return response

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


def _content(text: str, chat: bool, finished: bool = False) -> dict[str, str]:
    if not chat:
        return {"text": text}
    reasoning, answer = split_reasoning(text, finished)
    return {"content": answer, "reasoning_content": reasoning or ""}


def _choice(content: dict[str, str], reason: str | None, chat: bool, name: str) -> dict[str, Any]:
    content = {name: content} if chat else {"text": "", **content}
    return {"choices": [{"index": 0, "finish_reason": reason, **content}]}


def _usage(request: Request, stream: Stream) -> dict[str, Any]:
    read, written = len(request.prompt), len(stream.completion.tokens)
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"usage": counts}


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind}}


async def _send(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(content)}\n\n".encode())
