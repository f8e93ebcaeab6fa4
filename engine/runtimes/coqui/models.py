"""Builds and fills Coqui's VITS and XTTS v2, and runs them to speak.

Importing this module imports torch and the library, which takes some seconds. It also undoes what
the library does to the process.
"""

from __future__ import annotations

import logging
import wave
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch.serialization import add_safe_globals
from TTS.config.shared_configs import BaseDatasetConfig
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.configs.xtts_config import XttsArgs, XttsAudioConfig, XttsConfig
from TTS.tts.layers.glow_tts.transformer import RelativePositionMultiHeadAttention
from TTS.tts.models import xtts as xtts_module
from TTS.tts.models.vits import Vits
from TTS.tts.models.xtts import Xtts

from engine.events import Samples, Speech
from engine.files.pickled import load_pickled
from engine.process.gate import GATE
from engine.process.randomness import draw_by_thread
from engine.requests import SpeechRequest
from engine.runtimes.common.clones import Clones
from engine.runtimes.common.speech import cannot_speak, pieces_that_fit
from engine.runtimes.common.speech_run import Speaker
from engine.runtimes.common.utterance import Utterance
from engine.runtimes.coqui.files import CoquiFiles
from engine.runtimes.coqui.options import CoquiOptions

log = logging.getLogger(__name__)

PAUSE_SAMPLES = 10_000
"""Silence after every sentence of VITS, as `PAD_SILENCE_SAMPLES` of Coqui's `Synthesizer`."""

draw_by_thread(
    "TTS.tts.models.vits",
    "TTS.tts.layers.vits.stochastic_duration_predictor",
    "TTS.tts.layers.xtts.stream_generator",
)


def own_logging() -> None:
    """Put the library's loggers under the rules of the process.

    The trainer, which comes with the library, prints through its own handler. The tokenizers warn
    with the text of the request.
    """
    trainer = logging.getLogger("trainer")
    trainer.handlers.clear()
    trainer.propagate = True
    for name in ("trainer", "TTS"):
        logging.getLogger(name).setLevel(logging.ERROR)


def build(files: CoquiFiles, options: CoquiOptions, device: str) -> Speaker:
    """The model, filled, in host memory. Call inside `GATE.exclusive()`.

    Raises:
        LoadFailed: the checkpoint is damaged, or holds what would have to be executed.
        Exception: any error of the library. The weights do not match the configuration.

    """
    made = XttsSpeaker if files.kind == "xtts" else VitsSpeaker
    return made(files, options, device)


class VitsSpeaker(Speaker):
    """VITS with one voice or several. Every sentence is one piece of audio."""

    def __init__(self, files: CoquiFiles, options: CoquiOptions, device: str) -> None:  # noqa: ARG002
        config = VitsConfig()
        config.from_dict(dict(files.config))
        model = Vits(config)
        with GATE.yielded():
            tensors = load_pickled(files.checkpoint)["model"]
            # As in the library's `load_checkpoint`: some checkpoints hold the training's encoder.
            kept = {name: each for name, each in tensors.items() if "speaker_encoder" not in name}
            model.load_state_dict(kept)
        model.eval()
        # Training and voice conversion need these. Speaking does not.
        model.disc = None
        model.posterior_encoder = None
        self._many_languages = len(files.languages) > 1
        super().__init__(model, device)

    def check(self, utterance: Utterance) -> None:
        """Refuse words of which the model knows no letter. The library drops unknown characters.

        With phonemes, espeak reads every letter; what it gives for a sentence must be known.
        """
        tokenizer = self.module.tokenizer
        language = utterance.language if self._many_languages else None
        for sentence in utterance.sentences:
            if tokenizer.phonemizer is not None:
                if sentence.isascii():
                    continue  # espeak takes milliseconds
                words = [tokenizer.phonemizer.phonemize(sentence, separator="", language=language)]
            else:
                cleaner = tokenizer.text_cleaner
                cleaned = sentence if cleaner is None else cleaner(sentence, lang=language)
                words = cleaned.split()
            for word in words:
                letters = [character for character in word if character.isalnum()]
                if letters and not any(_knows(tokenizer.characters, each) for each in letters):
                    raise cannot_speak(word)

    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:
        """Each sentence, with the library's pause after it."""
        model = self.module
        model.length_scale = model.args.length_scale / request.speed
        for sentence in utterance.sentences:
            wave_form = np.asarray(
                model.synthesize(
                    sentence,
                    speaker=utterance.voice,
                    language=utterance.language if self._many_languages else None,
                )["wav"],
                dtype=np.float32,
            ).reshape(-1)
            if model.config.audio.get("do_trim_silence"):
                wave_form = wave_form[: model.ap.find_endpoint(wave_form)]
            pause = np.zeros(PAUSE_SAMPLES, np.float32)
            yield Speech(np.concatenate([wave_form, pause]), model.config.audio.sample_rate)

    def forget_run(self) -> None:
        """Drop the last scores, which every attention layer keeps: heads × positions²."""
        for each in self.module.modules():
            if isinstance(each, RelativePositionMultiHeadAttention):
                each.attn = None


def _knows(characters: Any, character: str) -> bool:
    try:
        characters.char_to_id(character)
    except KeyError:
        return False
    return True


class _XttsFromFile(Xtts):  # type: ignore[misc]
    """XTTS that reads its checkpoint in the only way that we allow.

    The library would rewrite the file if it holds the old classes.
    """

    def _load_checkpoint(self, model_path: Path) -> Any:
        with GATE.yielded():
            return load_pickled(Path(model_path))["model"]


class XttsSpeaker(Speaker):
    """XTTS v2, with its own voices and clones. Audio comes before a sentence is finished."""

    def __init__(self, files: CoquiFiles, options: CoquiOptions, device: str) -> None:
        log.warning(
            "%s: the weights of XTTS v2 are under the Coqui Public Model License, which allows"
            " non-commercial use only",
            files.folder.name,
        )
        config = XttsConfig()
        config.from_dict(dict(files.config))
        model = _XttsFromFile(config)
        model.load_checkpoint(config, checkpoint_dir=files.folder, eval=True)
        self._config = config
        self._chunk_tokens = options.stream_chunk_tokens
        self._sampling = {
            name: config[name] if given is None else given
            for name, given in (
                ("temperature", options.temperature),
                ("length_penalty", None),
                ("repetition_penalty", options.repetition_penalty),
                ("top_k", options.top_k),
                ("top_p", options.top_p),
            )
        }
        self._clones = Clones(self._hear)
        super().__init__(model, device)

    def check(self, utterance: Utterance) -> None:
        """Refuse a sentence without a known token but the mark of its language."""
        assert utterance.language is not None
        tokenizer = self.module.tokenizer
        empty = {tokenizer.tokenizer.token_to_id(each) for each in ("[UNK]", "[SPACE]")}
        empty.update(tokenizer.encode("", lang=utterance.language))
        for sentence in utterance.sentences:
            tokens = tokenizer.encode(sentence.strip().lower(), lang=utterance.language)
            if empty.issuperset(tokens):
                raise cannot_speak(sentence)

    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:
        """Pieces of `stream_chunk_tokens` tokens of 46 ms. The last of a sentence is shorter."""
        assert utterance.language is not None
        latents, embedding = self._voice(request, utterance)
        for sentence in utterance.sentences:
            fits = partial(self._fits, utterance.language)
            for text in pieces_that_fit(sentence, utterance.language, fits):
                for chunk in self.module.inference_stream(
                    text,
                    utterance.language,
                    latents,
                    embedding,
                    stream_chunk_size=self._chunk_tokens,
                    speed=request.speed,
                    **self._sampling,
                ):
                    # A copy: the library keeps writing to the end of the chunk that it returned.
                    samples: Samples = chunk.cpu().numpy().astype(np.float32, copy=True)
                    if len(samples):
                        yield Speech(samples, self._config.audio.output_sample_rate)

    def forget_run(self) -> None:
        """Drop the embeddings of the last prompt, which the language model keeps."""
        self.module.gpt.gpt_inference.cached_prefix_emb = None

    def _fits(self, language: str, sentence: str) -> bool:
        tokens = self.module.tokenizer.encode(sentence.strip().lower(), lang=language)
        return len(tokens) < int(self.module.args.gpt_max_text_tokens)

    def _voice(self, request: SpeechRequest, utterance: Utterance) -> tuple[Any, Any]:
        """The latents for the language model and the embedding for the vocoder."""
        if request.voice_sample is None:
            speaker = self.module.speaker_manager.speakers[utterance.voice]
            return speaker["gpt_cond_latent"], speaker["speaker_embedding"]
        return self._clones.get(request.voice_sample)

    def _hear(self, recording: Path) -> tuple[Any, Any]:
        latents, embedding = self.module.get_conditioning_latents(
            audio_path=str(recording),
            max_ref_length=self._config.max_ref_len,
            gpt_cond_len=self._config.gpt_cond_len,
            gpt_cond_chunk_len=self._config.gpt_cond_chunk_len,
            sound_norm_refs=self._config.sound_norm_refs,
        )
        return latents.cpu(), embedding.cpu()


def _read_wav(path: str, sample_rate: int) -> torch.Tensor:
    """(1, samples) of a mono WAV file of 16 bits, at the given rate.

    It replaces the library's `load_audio`. That needs torchaudio, which needs torchcodec and
    FFmpeg's shared libraries to open any file.
    """
    with wave.open(path, "rb") as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            raise wave.Error("not a mono file of 16 bit")
        rate = file.getframerate()
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    audio = torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
    if rate != sample_rate:
        audio = torchaudio.functional.resample(audio, rate, sample_rate)
    return audio.clip_(-1, 1)


xtts_module.load_audio = _read_wav
# The released checkpoint of XTTS v2 holds its configuration as objects. They have plain fields, and
# their classes have moved since.
add_safe_globals([XttsArgs, XttsAudioConfig, XttsConfig, BaseDatasetConfig])
add_safe_globals(
    [(each, f"{xtts_module.__name__}.{each.__name__}") for each in (XttsArgs, XttsAudioConfig)]
)
own_logging()
