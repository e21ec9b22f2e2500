"""The routes: OpenAI's completions, chats and models, and the operator's health, metrics and dashboard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from soloist import __version__
from soloist.errors import RequestError
from soloist.server.answers import ChatForm, EchoOnly, Form
from soloist.server.desk import Desk
from soloist.server.details import Details
from soloist.server.gate import Gate
from soloist.server.metrics import Metrics, Tally
from soloist.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SharedFields,
    TokenizeRequest,
    parse,
)
from soloist.server.refusals import Refusal
from soloist.server.respond import Answer
from soloist.server.served import Served
from soloist.server.watch import Watch

BODY_S = 30.0  # for a client to send its body
DASHBOARD = Path(__file__).parent / "dashboard" / "index.html"
MAX_PROMPTS = 256  # of one request
log = logging.getLogger("soloist.server")


@dataclass(frozen=True)
class Limits:
    """What the server bounds. Each call ends within `request_timeout_s`."""

    max_waiting: int = 1024
    request_timeout_s: float = 600.0
    max_body_bytes: int = 8 * 2**20


def make_app(
    served: Served,
    limits: Limits = Limits(),  # noqa: B008
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application; `app.state.desk` takes its calls while it runs. `origins`: of web pages that may."""
    desk = Desk(served, limits.max_waiting, limits.request_timeout_s)

    tally, watch = Tally(served.slo), Watch(served.front, served.gpus_per_node)
    served.front.requests.observe = tally.observe

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.open()
        listening = asyncio.create_task(watch.listen())
        listening.add_done_callback(_complain)
        yield
        listening.cancel()
        desk.close()

    app = FastAPI(title="Soloist", lifespan=lifespan, redoc_url=None)
    app.state.desk, app.state.limits = desk, limits
    app.state.metrics, app.state.details = Metrics(desk, tally, watch), Details(desk, tally, watch)
    app.add_middleware(Gate, keys=keys)
    if origins:  # around the gate: a browser asks beforehand, without a key
        told = ("X-Request-Id", "Retry-After")
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=told
        )
    for path, endpoint in (
        ("/v1/completions", completions),
        ("/v1/chat/completions", chat),
        ("/tokenize", tokenize),
        ("/detokenize", detokenize),
    ):
        app.add_api_route(path, endpoint, methods=["POST"])
    for path, endpoint in (("/v1/models", models), ("/v1/models/{name:path}", model), ("/version", version)):
        app.add_api_route(path, endpoint)
    app.add_api_route("/", home, include_in_schema=False)
    app.add_api_route("/dashboard", dashboard)
    for path, endpoint in (("/health", health), ("/metrics", metrics), ("/details", details)):
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    return app


# -- answers ----------------------------------------------------------------------------------------------------------
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    desk = _desk(request)
    wanted = parse(await _body(request), CompletionRequest)
    _check_model(wanted.model, desk.served)
    if len(wanted.prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(wanted.prompts)} prompts in one request, at most {MAX_PROMPTS} are taken")
    served = desk.served
    prompts = [await served.encode(prompt, wanted.add_special_tokens is not False) for prompt in wanted.prompts]
    echoed = [p if isinstance(p, str) else served.decode(p) for p in wanted.prompts] if wanted.echo else []
    return _answer(desk, wanted, prompts, EchoOnly if wanted.only_scores else Form, echoed)


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    desk = _desk(request)
    wanted = parse(await _body(request), ChatRequest)
    _check_model(wanted.model, desk.served)
    return _answer(desk, wanted, [await _chat_tokens(desk, wanted, wanted.messages)], ChatForm)


async def _chat_tokens(
    desk: Desk, wanted: ChatRequest | TokenizeRequest, messages: Sequence[ChatMessage]
) -> Sequence[int]:
    plain, answers = [message.plain() for message in messages], wanted.add_generation_prompt is not False
    return await desk.served.encode_chat(plain, wanted.chat_template_kwargs, answers)


def _answer(
    desk: Desk,
    wanted: SharedFields,
    prompts: Sequence[Sequence[int]],
    form: type[Form],
    echoed: Sequence[str] = (),
) -> Answer:
    longest = desk.front.longest_sequence
    params = [wanted.params(_max_tokens(len(prompt), wanted.most_tokens, longest)) for prompt in prompts]
    call = desk.submit(prompts, params, bool(wanted.stream))
    style = form(
        desk.served.name, desk.served.text_of, wanted.includes_usage, bool(wanted.return_token_ids), params[0].n, echoed
    )
    return Answer(desk, call, style)


def _max_tokens(prompt: int, wanted: int | None, longest: int) -> int:
    """Tokens of a continuation; refuses what could never be reached."""
    room = longest - prompt
    if room < 1 or (wanted or 0) > room:
        asked = f" and max_tokens = {wanted}" if wanted else ""
        message = f"a prompt of {prompt} tokens{asked}: at most {longest} tokens are served in all"
        raise Refusal(400, message, "context_length_exceeded", "prompt" if room < 1 else "max_tokens")
    return room if wanted is None else wanted


# -- about the server -------------------------------------------------------------------------------------------------
async def models(request: Request) -> dict[str, Any]:
    """What is served."""
    return {"object": "list", "data": [_card(_desk(request))]}


async def model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    _check_model(name, _desk(request).served)
    return _card(_desk(request))


async def tokenize(request: Request) -> dict[str, Any]:
    """A text or a chat as tokens."""
    desk = _desk(request)
    wanted = parse(await _body(request), TokenizeRequest)
    if wanted.model is not None:
        _check_model(wanted.model, desk.served)
    if wanted.messages is None:
        tokens = await desk.served.encode(wanted.prompt or "", wanted.add_special_tokens is not False)
    else:
        tokens = await _chat_tokens(desk, wanted, wanted.messages)
    return {"count": len(tokens), "max_model_len": desk.front.longest_sequence, "tokens": list(tokens)}


async def detokenize(request: Request) -> dict[str, Any]:
    """Tokens as text."""
    desk = _desk(request)
    wanted = parse(await _body(request), DetokenizeRequest)
    if wanted.model is not None:
        _check_model(wanted.model, desk.served)
    return {"prompt": desk.served.decode(wanted.tokens)}


async def version() -> dict[str, str]:
    """Of the program."""
    return {"version": __version__}


async def health(request: Request) -> Response:
    """200 while calls are taken; 503 with the reason while the server drains, or after a rank was lost."""
    desk = _desk(request)
    reason = str(desk.front.failure) if desk.front.failure else "shutting down" if desk.draining else None
    return JSONResponse({"status": "ok"} if reason is None else {"status": reason}, 200 if reason is None else 503)


async def metrics(request: Request) -> Response:
    """In Prometheus' form."""
    return Response(request.app.state.metrics.page(), media_type=CONTENT_TYPE_LATEST)


async def details(request: Request) -> Response:
    """What the dashboard shows, as JSON: every layer's experts, every rank, who sends to whom and waits for whom.

    `?rank=17` adds all dealings of one rank.
    """
    given, ranks = request.query_params.get("rank"), _desk(request).front.ranks
    if given is not None and given not in map(str, ranks):
        raise RequestError(f"rank = {given!r}: must lie between 0 and {len(ranks) - 1}")
    page = request.app.state.details.page(None if given is None else int(given))
    return Response(page, media_type="application/json")


async def home() -> Response:
    """Who opens the address that the server printed finds a page."""
    return RedirectResponse("dashboard")  # relative: a proxy may serve all of this under a path of its own


async def dashboard() -> Response:
    """A page that shows the details as they change."""
    return FileResponse(DASHBOARD, media_type="text/html")


def _card(desk: Desk) -> dict[str, Any]:
    served = desk.served
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "soloist",
        "max_model_len": desk.front.longest_sequence,
    }


# -- bodies and errors ------------------------------------------------------------------------------------------------
def _desk(request: Request) -> Desk:
    return request.app.state.desk


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        raise Refusal(404, f"model = {name!r}: this server has {served.name!r}", "model_not_found", "model")


async def _body(request: Request) -> bytes:
    """All of the body, refused as soon as it is known to be too large or too slow."""
    limit = request.app.state.limits.max_body_bytes
    too_large = Refusal(
        413, f"the body is larger than {limit} bytes", "body_too_large", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_S:g} s", "body_timeout") from None
    return bytes(body)


def _complain(task: asyncio.Task[None]) -> None:
    """The watch over the ranks ends only when it is told to."""
    if not task.cancelled() and (error := task.exception()):
        log.error("figures of the ranks are no longer asked for", exc_info=error)


async def _refused(_: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal.of(error)  # type: ignore[arg-type]
    return refusal.response


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return Refusal(error.status_code, message, code, headers=dict(error.headers or {})).response


async def _gone(_: Request, error: Exception) -> Response:
    return Refusal(400, "the client left before its body was complete", "client_closed").response


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of ours. This response does not pass the gate any more."""
    name = request.state.request_id
    log.error("internal error", exc_info=error, extra={"fields": {"request_id": name}})
    message = f"internal error; see the log for request {name}"
    return Refusal(500, message, "internal", headers={"X-Request-Id": name}).response
