"""Ollama's API, for programs that speak only that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import Request, Response
from starlette.types import Send

from engine.catalog.model_files import removable, remove_all
from engine.errors import InvalidRequest, NotFound
from engine.status import ModelState
from server.connection import ConnectedResponse
from server.forms import Fields, read_json
from server.keys.access import access_of
from server.media import check_media_urls
from server.ollama.abilities import AbilityReader
from server.ollama.answer import send_answer
from server.ollama.embedding import send_embedding, send_embeddings
from server.ollama.listing import Listing
from server.ollama.names import check_known, find_model, not_found, own_name
from server.ollama.pulling import send_pull
from server.ollama.reply import Reply, Shape, loaded_document
from server.ollama.residence import bring
from server.ollama.translation import (
    Sender,
    Translated,
    chat_request,
    embed_request,
    embeddings_request,
    generate_request,
)
from server.packages import installed_version
from server.router import Router, json_response
from server.schemas.ollama import (
    OllamaChatBody,
    OllamaDeleteBody,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaGenerateBody,
    OllamaPullBody,
    OllamaShowBody,
    take_model,
)
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.pictures import Pictures

SPOKEN_VERSION = "0.13.0"
"""The version of Ollama whose API this is. Programs ask, and refuse one that is too old."""

REFUSED = {
    "copy": "an alias in the configuration gives a model another name",
    "create": "models are in the configuration; `roundhouse add` writes them there",
    "push": "this server fetches models and uploads none",
}
"""Routes of Ollama that are refused, and why."""


def ollama_router(engine: Engine, settings: ServerSettings, pictures: Pictures) -> Router:
    """`/api/…`."""
    router = Router("ollama")
    reader = AbilityReader(engine)
    listing = Listing(engine, reader)

    async def read(request: Request) -> tuple[Fields, str, Sender]:
        """The fields, the client's name of the model, and whose request it is."""
        fields = await read_json(request, settings.max_body_bytes)
        take_model(fields)
        named = fields.values.get("model")
        if isinstance(named, str):
            # First, as a key is limited to models by the names of the configuration.
            fields.values["model"] = own_name(engine, named)
        scheduling = take_scheduling_options(request, fields)
        return fields, str(named), Sender(request.state.request_id, scheduling)

    async def respond(
        translated: Translated, named: str, shape: Shape, *, streams: bool
    ) -> Response:
        try:
            check_media_urls(translated.request.body, settings.allowed_media_hosts)
            await pictures.settle(translated.request)
        except InvalidRequest as error:
            raise translated.renamed(error) from None
        reply = Reply(named, shape)
        return ConnectedResponse(partial(send_answer, engine, translated, reply, streams=streams))

    def respond_without(sender: Sender, name: str, empty: Callable[[str], Any]) -> Response:
        """Load or unload the model. `empty` is the answer to a request without a prompt."""

        async def answer(_send: Send) -> Response:
            return json_response(empty(await bring(engine, name, sender)))

        return ConnectedResponse(answer)

    @router.post("/api/chat")
    async def ollama_chat(request: Request) -> Response:
        fields, named, sender = await read(request)
        body = OllamaChatBody.of(fields)
        check_known(engine, body.model)
        if not body.messages:
            empty = partial(loaded_document, named, Shape.CHAT)
            return respond_without(sender, body.model, empty)
        abilities = await asyncio.to_thread(reader.abilities, body.model)
        translated = chat_request(body, abilities, sender)
        return await respond(translated, named, Shape.CHAT, streams=body.stream)

    @router.post("/api/generate")
    async def ollama_generate(request: Request) -> Response:
        fields, named, sender = await read(request)
        body = OllamaGenerateBody.of(fields)
        check_known(engine, body.model)
        if not body.prompt and not body.images and not body.suffix:
            empty = partial(loaded_document, named, Shape.GENERATE)
            return respond_without(sender, body.model, empty)
        abilities = await asyncio.to_thread(reader.abilities, body.model)
        translated = generate_request(body, abilities, sender)
        return await respond(translated, named, Shape.GENERATE, streams=body.stream)

    @router.post("/api/embed")
    async def ollama_embed(request: Request) -> Response:
        fields, named, sender = await read(request)
        body = OllamaEmbedBody.of(fields)
        check_known(engine, body.model)
        if not any(body.input):
            nothing = {"model": named, "embeddings": []}
            return respond_without(sender, body.model, lambda _: nothing)
        translated = embed_request(body, sender)
        return ConnectedResponse(partial(send_embeddings, engine, translated, named))

    @router.post("/api/embeddings")
    async def ollama_embeddings(request: Request) -> Response:
        fields, _, sender = await read(request)
        body = OllamaEmbeddingsBody.of(fields)
        check_known(engine, body.model)
        if not body.prompt:
            return respond_without(sender, body.model, lambda _: {"embedding": []})
        translated = embeddings_request(body, sender)
        return ConnectedResponse(partial(send_embedding, engine, translated))

    @router.route("/api/tags", "GET", "HEAD")
    async def ollama_tags(request: Request) -> dict[str, Any]:
        access = access_of(request)
        models = await asyncio.to_thread(listing.tags, engine.status())
        return {"models": [each for each in models if access.may_use(each["model"])]}

    @router.get("/api/ps")
    async def ollama_ps(request: Request) -> dict[str, Any]:
        access = access_of(request)
        models = await asyncio.to_thread(listing.running, engine.status())
        return {"models": [each for each in models if access.may_use(each["model"])]}

    @router.post("/api/show")
    async def ollama_show(request: Request) -> dict[str, Any]:
        fields, _, _ = await read(request)
        body = OllamaShowBody.of(fields)
        check_known(engine, body.model)
        return await asyncio.to_thread(listing.show, body.model, engine.status())

    @router.route("/api/version", "GET", "HEAD")
    async def ollama_version() -> dict[str, Any]:
        return {
            "version": SPOKEN_VERSION,
            "roundhouse": installed_version("roundhouse") or "unknown",
        }

    @router.post("/api/pull")
    async def ollama_pull(request: Request) -> Response:
        fields, _, _ = await read(request)
        body = OllamaPullBody.of(fields)
        if body.insecure:
            raise InvalidRequest("The hub is asked over TLS only.", param="insecure")
        model = find_model(engine, body.model)
        return ConnectedResponse(partial(send_pull, engine, model, streams=body.stream))

    @router.delete("/api/delete")
    async def ollama_delete(request: Request) -> Response:
        fields, _, _ = await read(request)
        body = OllamaDeleteBody.of(fields)
        model = find_model(engine, body.model)
        found = await asyncio.to_thread(removable, model, engine.config)
        if not found:
            raise NotFound(f"{not_found(body.model).message}: none of its files are on this disk")
        if engine.model_status(model.id).state is not ModelState.ABSENT:
            await engine.unload(model.id)  # as Ollama does
        await engine.remove_files(model.id, partial(remove_all, found))
        return Response(status_code=200)

    def refuse(action: str, reason: str) -> None:
        async def endpoint(request: Request) -> NoReturn:
            await read_json(request, settings.max_body_bytes)
            raise InvalidRequest(f"/api/{action} is not served here: {reason}", status=400)

        router.add(f"/api/{action}", endpoint, ["POST"], name=f"ollama_{action}")

    for action, reason in REFUSED.items():
        refuse(action, reason)
    return router
