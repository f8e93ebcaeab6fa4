"""Pocket TTS of Kyutai: speech at 24 kHz, 80 ms at a time, with cloned voices.

Nothing here imports the library before `start`; the model itself is in
`engine.runtimes.pocket_tts.model`. The library would fetch weights, tokenizers and voices from a
hub. It gets the files of this disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes, weight_bytes
from engine.media.sentences import split_sentences
from engine.memory.block import Block, Estimate
from engine.model_folder import present_folder
from engine.process.gate import GATE
from engine.requests import Request, SpeechRequest
from engine.runtimes.base import Prepared, Voice
from engine.runtimes.common.clones import recording_s
from engine.runtimes.common.speech import (
    SpeechModel,
    check_no_clone,
    check_own_speed,
    check_scripts,
    check_speech,
    choose_language,
    choose_or_clone,
)
from engine.runtimes.common.torch_model import TorchRuntime
from engine.runtimes.common.utterance import Utterance
from engine.runtimes.pocket_tts.files import (
    CONFIG_FILE,
    LANGUAGES,
    NO_CLONING,
    PocketFiles,
    config_language,
    find_files,
    hub_sources,
    library_config,
)
from engine.runtimes.pocket_tts.options import PocketOptions
from engine.runtimes.pocket_tts.working_memory import (
    CHUNK_TOKENS,
    MAX_SAMPLE_S,
    cloning_bytes,
    speech_bytes,
)
from engine.runtimes.recognised import Recognised
from engine.section import Section

ENGLISH = "languages/english/model.safetensors"
"""A file of Kyutai's repositories."""

SENTENCE_CHARS = 1000
"""Of the sentences that are checked for words without a token. The library cuts texts itself."""

HEARING = (
    "flow_lm.speaker_proj_weight",
    "mimi.encoder.",
    "mimi.encoder_transformer.",
    "mimi.downsample.",
)
"""How the names of weights begin that only cloning needs."""


class PocketRuntime(TorchRuntime):
    """Loads Pocket TTS models."""

    name: ClassVar[str] = "pocket_tts"
    tasks: ClassVar[tuple[str, ...]] = ("speech",)
    Options: ClassVar[type[Section]] = PocketOptions

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        """The weights, and where the library's configuration says that the other parts are."""
        return hub_sources(model)

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """Look whether the library knows the model."""
        name = model.options_as(PocketOptions).config
        if name is not None:
            try:
                library_config(name)
            except LoadFailed as error:
                raise ValueError(f"options.config: {error.message}") from error

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        """Kyutai's folders of languages, or a `config.yaml` of the library's beside weights."""
        if ENGLISH in repository.paths:
            return Recognised(cls.name, "speech", {"config": "english"})
        own = CONFIG_FILE in repository.paths and repository.has(".safetensors")
        if own and "flow_lm:" in repository.text(CONFIG_FILE):
            return Recognised(cls.name, "speech")
        return None

    def start(self) -> None:
        """Import torch and pocket-tts. The library sets torch to one thread, which is undone."""
        import torch

        threads = torch.get_num_threads()
        from engine.runtimes.pocket_tts import model  # noqa: F401 - for its imports

        torch.set_num_threads(threads)

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check text, voice, language and speed; fill in the defaults."""
        options = model.options_as(PocketOptions)
        asked = check_speech(model, options.max_chars, request)
        check_own_speed(model.id, asked)
        if asked.voice_sample is not None and not _clones(model):
            check_no_clone(model.id, asked)
        files = find_files(model, self._present)
        if files is None:
            return Prepared(asked, None)
        utterance = _utterance(model, files, asked)
        # A token has a character or more.
        tokens = min(CHUNK_TOKENS, -(-len(asked.text) // 10) * 10)
        working = speech_bytes(files.config, tokens, options.stream_frames)
        shape = f"speech-{tokens}"
        if asked.voice_sample is not None:
            seconds = min(MAX_SAMPLE_S, recording_s(asked.voice_sample))
            working = max(working, cloning_bytes(files.config, seconds))
            shape += f"-cloned-{seconds:.0f}"
        return Prepared(asked, utterance, working_bytes=working, shape=shape)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """The voices beside the weights, the library's first one first."""
        language = next(iter(_languages(model)), None)
        return tuple(Voice(name, name, language) for name in self._files(model).voices)

    def weight_files(self, model: ModelConfig) -> Sequence[Path]:
        """The one file of weights."""
        return (self._files(model).weights,)

    def estimate(self, model: ModelConfig) -> Estimate:
        """Sum the tensors of the checkpoint by part. They are float32 in memory."""
        weights = self._files(model).weights
        try:
            tensors = tensor_sizes([weights])
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{weights.name}: cannot read: {error}") from error
        sizes: defaultdict[str, int] = defaultdict(int)
        for name, size in tensors.items():
            if _clones(model) or not name.startswith(HEARING):
                part = name.partition(".")[0]
                sizes[part] += weight_bytes({name: size}, DTYPE_BYTES["float32"])
        parkable = self.context.host is not None
        blocks = tuple(Block(name, nbytes, parkable) for name, nbytes in sizes.items())
        nbytes = sum(block.nbytes for block in blocks)
        # Disk at 1 GB/s and half a second of building. The first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=0.5 + nbytes / 1e9)

    def _build(self, model: ModelConfig) -> SpeechModel:
        from engine.runtimes.pocket_tts.model import PocketSpeaker

        files = self._files(model)
        options = model.options_as(PocketOptions)
        device = self.context.device.kind
        with GATE.exclusive():
            speaker = PocketSpeaker(files, options, device, clones=_clones(model))
        return SpeechModel(speaker, model.id, partial(_utterance, model, files))

    def _files(self, model: ModelConfig) -> PocketFiles:
        """The files of a model, built if need be.

        Raises:
            LoadFailed: one is not here.

        """
        files = find_files(
            model, lambda source, revision: self._folder_of(HubSource(source, (), revision))
        )
        assert files is not None
        for path in (files.weights, files.tokenizer):
            if not path.is_file():
                raise LoadFailed(f"{model.source.rpartition('/')[2]}: no {path.name}")
        return files

    def _present(self, source: str, revision: str | None) -> Path | None:
        return present_folder(source, self.context.cache_dir, revision=revision)


def _clones(model: ModelConfig) -> bool:
    """Whether the weights of a model can clone a voice."""
    said = model.options_as(PocketOptions).voice_cloning
    return not model.source.rstrip("/").endswith(NO_CLONING) if said is None else said


def _languages(model: ModelConfig) -> tuple[str, ...]:
    """What a model speaks, if the library or the configuration says it."""
    options = model.options_as(PocketOptions)
    if options.config is not None:
        return (LANGUAGES[config_language(options.config)][0],)
    return () if options.language is None else (options.language,)


def _utterance(model: ModelConfig, files: PocketFiles, request: SpeechRequest) -> Utterance:
    """The request in the model's terms.

    Raises:
        InvalidRequest: naming `voice`, `language` or `input`.

    """
    options = model.options_as(PocketOptions)
    language = choose_language(model.id, options, request, _languages(model))
    if language is not None:
        check_scripts(model.id, request.text, [language])
    voice = choose_or_clone(model.id, options, request, list(files.voices))
    sentences = split_sentences(request.text, language or "en", max_chars=SENTENCE_CHARS)
    assert request.seed is not None
    return Utterance(tuple(sentences), voice, language, request.seed)
