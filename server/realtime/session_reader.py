"""Reads the document of a realtime session, and finds the models that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import InvalidRequest
from server.forms import Fields
from server.keys.access import Access
from server.schemas.fields import MODEL_MISSING, Body
from server.schemas.realtime import RealtimeSession, Session, TranscriptionSession

if TYPE_CHECKING:
    from engine.config import EngineConfig

BodyT = TypeVar("BodyT", bound=Body)

_ANSWERS = "session.model"
_HEARS = "session.audio.input.transcription.model"
_SPEAKS = "session.audio.output.model"


class SessionReader:
    """Knows the models of the configuration, and what one key may use of them."""

    def __init__(self, config: EngineConfig, access: Access) -> None:
        self._config = config
        self._access = access

    def read(self, document: Mapping[str, Any], *, model_later: bool = False) -> Session:
        """The session of a document. With `model_later` it need not name its language model yet.

        Raises:
            InvalidRequest: naming the wrong field; or the configuration lacks a model.
            ModelForbidden: the key may not use one of the models.
            ModelNotFound: there is no such model.

        """
        session: Session
        if document.get("type") == "transcription":
            session = within("session", TranscriptionSession, document)
        else:
            session = within("session", RealtimeSession, document)
        for name, task, param in self._needs(session, model_later=model_later):
            self._access.check_model(name)
            if self._config.find(name).task != task:
                raise InvalidRequest(f"{name!r} is no model with the task {task}.", param=param)
        return session

    def names(self, session: Session) -> tuple[str, ...]:
        """The models that the session needs, the language model first."""
        return tuple(name for name, _, _ in self._needs(session))

    def _needs(self, session: Session, *, model_later: bool = False) -> list[tuple[str, str, str]]:
        """Each model, the task that it must have, and the field that names it."""
        hears = (self.hearing_model(session), "transcribe", _HEARS)
        if isinstance(session, TranscriptionSession):
            return [hears]
        needs = [hears]
        if session.model is not None or not model_later:
            needs.insert(0, (language_model(session), "generate", _ANSWERS))
        if "audio" in session.output_modalities:
            needs.append((self.speech_model(session), "speech", _SPEAKS))
        return needs

    def hearing_model(self, session: Session) -> str:
        """The model that transcribes.

        Raises:
            InvalidRequest: none is named, and the configuration has none for the key.

        """
        transcription = session.audio.input.transcription
        named = None if transcription is None else transcription.model
        return named or self.first("transcribe", _HEARS)

    def speech_model(self, session: RealtimeSession) -> str:
        """The model that speaks.

        Raises:
            InvalidRequest: none is named, and the configuration has none for the key.

        """
        return session.audio.output.model or self.first("speech", _SPEAKS)

    def first(self, task: str, param: str) -> str:
        """The first model of a task that the key may use.

        Raises:
            InvalidRequest: there is none. Names `param`.

        """
        for model in self._config.models:
            if model.task == task and self._access.may_use(model.id):
                return model.id
        raise InvalidRequest(f"The configuration has no model with the task {task}.", param=param)

    def describe(self, session: Session) -> dict[str, Any]:
        """The session as clients see it, with the models that it has by default."""
        document = session.model_dump(mode="json", exclude_none=False)
        audio = document["audio"]
        if audio["input"]["transcription"] is not None:
            audio["input"]["transcription"]["model"] = self.hearing_model(session)
        if isinstance(session, RealtimeSession):
            if "audio" in session.output_modalities:
                audio["output"]["model"] = self.speech_model(session)
            document["object"] = "realtime.session"
        else:
            document["object"] = "realtime.transcription_session"
        return document


def language_model(session: RealtimeSession) -> str:
    """The model that answers.

    Raises:
        InvalidRequest: the session names none.

    """
    if session.model is None:
        raise InvalidRequest(MODEL_MISSING, param=_ANSWERS)
    return session.model


def within(field: str, kind: type[BodyT], document: Mapping[str, Any]) -> BodyT:
    """An object of a request, checked. An error names the field with where it stands.

    Raises:
        InvalidRequest: naming the first wrong field, after `field`.

    """
    try:
        return kind.of(Fields(dict(document), typed=True))
    except InvalidRequest as error:
        param = field if error.param is None else f"{field}.{error.param}"
        raise InvalidRequest(error.message, param=param) from error
