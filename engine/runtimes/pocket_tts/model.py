"""Builds Pocket TTS, and runs it to speak, frame by frame.

The library speaks with two threads of its own: one makes frames, the other decodes them. Here both
are done on the model's thread, so that a run has its own random numbers, stops within a module and
is measured. The samples are those of the library.

Importing this module imports torch and the library.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import InvalidRequest, LoadFailed, reason
from engine.events import Speech
from engine.process.gate import GATE
from engine.process.randomness import draw_by_thread
from engine.requests import SpeechRequest
from engine.runtimes.common.clones import Clones
from engine.runtimes.common.speech import cannot_speak, pieces_that_fit
from engine.runtimes.common.speech_run import Speaker
from engine.runtimes.common.torch_run import named_tensors
from engine.runtimes.common.utterance import Utterance
from engine.runtimes.pocket_tts.files import PocketFiles
from engine.runtimes.pocket_tts.options import PocketOptions
from engine.runtimes.pocket_tts.working_memory import CHUNK_TOKENS, MAX_SAMPLE_S
from pocket_tts.data.audio import audio_read
from pocket_tts.data.audio_utils import convert_audio, end_on_pause
from pocket_tts.models.mimi import build_mimi
from pocket_tts.models.text_chunking import prepare_text_prompt, split_into_best_sentences
from pocket_tts.models.tts_model import TTSModel, stamp_state_names
from pocket_tts.modules import attention
from pocket_tts.modules.stateful_module import increment_steps, init_states
from pocket_tts.utils.config import Config

FADE_S = 0.005
"""The library fades the begin of each chunk in: a fresh decoder clicks."""

draw_by_thread("pocket_tts.models.flow_lm")
# It logs each step of a run, and the text of chunks.
logging.getLogger("pocket_tts").setLevel(logging.ERROR)


class PocketSpeaker(Speaker):
    """The language model of frames, and the codec that makes sound of them."""

    def __init__(
        self, files: PocketFiles, options: PocketOptions, device: str, *, clones: bool
    ) -> None:
        """Build and fill every part, in host memory. Call inside `GATE.exclusive()`.

        Without `clones`, the parts that hear a recording are left out.

        Raises:
            LoadFailed: the weights are not those of the configuration.
            Exception: any error of the library.

        """
        config = _config_of(files)
        with torch.device("meta"):
            model = _empty(config, options)
        with GATE.yielded():
            tensors = {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(files.weights).items()
            }
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            name = files.weights.name
            raise LoadFailed(f"{name}: not of this configuration: {reason(error)}") from error
        left = [name for name, tensor in named_tensors(model) if tensor.is_meta]
        if left:
            raise LoadFailed(f"{files.weights.name}: the checkpoint lacks {left[0]}")
        if not clones:
            _drop_hearing(model)
        super().__init__(model.eval().requires_grad_(False), device)
        self._config = config
        self._voices = files.voices
        self._stream_frames = options.stream_frames
        self._clones = Clones(self._hear)
        self._settings: dict[str, Any] = {
            "pad_with_spaces_for_short_inputs": config.pad_with_spaces_for_short_inputs,
            "remove_semicolons": config.remove_semicolons,
            "append_terminal_punctuation": config.append_terminal_punctuation,
            "capitalize_first_letter": config.capitalize_first_letter,
            "replace_characters": config.replace_characters,
        }

    def check(self, utterance: Utterance) -> None:
        """Refuse a sentence without a known token."""
        tokenizer = self.module.flow_lm.conditioner.tokenizer
        unknown = set(tokenizer.encode("\U0010ffff"))  # no character, so in no vocabulary
        blank = set(tokenizer.encode(" "))
        for sentence in utterance.sentences:
            if set(tokenizer.encode(sentence)) <= unknown | blank:
                raise cannot_speak(sentence)

    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:
        """Pieces of `stream_frames` frames of 80 ms. The first has one, the last may be shorter."""
        voice = self._voice(request, utterance)
        first = True
        for text in self._chunks(request.text, utterance.language or "en"):
            for samples in self._say(text, voice, first=first):
                yield Speech(samples.cpu().numpy().astype(np.float32), self.module.sample_rate)
            first = False

    def _chunks(self, text: str, language: str) -> Iterator[str]:
        """Parts of the text as the library cuts it. It leaves what has no punctuation too long."""
        tokenizer = self.module.flow_lm.conditioner.tokenizer
        for chunk in split_into_best_sentences(tokenizer, text, CHUNK_TOKENS, **self._settings):
            yield from pieces_that_fit(
                chunk, language, lambda piece: len(tokenizer.encode(piece)) <= CHUNK_TOKENS
            )

    def _say(self, text: str, voice: Any, *, first: bool) -> Iterator[torch.Tensor]:
        """Samples of one chunk, in pieces."""
        prompt, extra_frames = prepare_text_prompt(text, **self._settings)
        tokens = self.module.flow_lm.conditioner.prepare(prompt)
        most_frames = self.module._estimate_max_gen_len(tokens.shape[1])
        decoder = _Decoder(self.module, most_frames)
        frames: list[torch.Tensor] = []
        wanted = 1 if first else self._stream_frames
        for frame in self._frames(tokens, voice, most_frames, extra_frames):
            frames.append(frame)
            if len(frames) == wanted:
                yield decoder.decode(frames)
                frames, wanted = [], self._stream_frames
        if frames:
            yield decoder.decode(frames)

    def _frames(
        self, tokens: torch.Tensor, voice: Any, most: int, extra: int
    ) -> Iterator[torch.Tensor]:
        """Frames (1, 1, width): at most `most`, and some `extra` after the end was heard.

        As in the library's `_autoregressive_generation`.
        """
        model = self.module
        after_end = model.model_recommended_frames_after_eos
        if after_end is None:
            after_end = extra + 2
        state = copy.deepcopy(voice)
        there = model._flow_lm_current_end(state)
        model._expand_kv_cache(state, sequence_length=there + tokens.shape[1] + most)
        model._run_flow_lm_and_increment_step(model_state=state, text_tokens=tokens)
        # The mark of the begin.
        frame = torch.full((1, 1, model.flow_lm.ldim), torch.nan, device=model.device)
        end: int | None = None
        for step in range(most):
            frame, is_end = model._run_flow_lm_and_increment_step(
                model_state=state, backbone_input_latents=frame
            )
            if end is None and step >= model._MIN_FRAMES_BEFORE_EOS and is_end.item():
                end = step
            if end is not None and step >= end + after_end:
                return
            yield frame

    def _voice(self, request: SpeechRequest, utterance: Utterance) -> Any:
        """The state of the language model after it has heard the voice."""
        if utterance.voice is not None:
            return self._stored_voice(utterance.voice)
        assert request.voice_sample is not None
        model, flow = self.module, self.module.flow_lm
        heard = self._clones.get(request.voice_sample).to(model.device)
        prompt = torch.nn.functional.linear(heard, flow.speaker_proj_weight)
        if flow.insert_bos_before_voice:
            prompt = torch.cat([flow.bos_before_voice, prompt], dim=1)
        state = init_states(flow, batch_size=1, sequence_length=prompt.shape[1])
        model._run_flow_lm_and_increment_step(model_state=state, audio_conditioning=prompt)
        return state

    def _stored_voice(self, name: str) -> Any:
        """The state in a file, read anew for each request: it is on the device for the run only."""
        model = self.module
        try:
            state = model.get_state_for_audio_prompt(self._voices[name])
            made = init_states(model.flow_lm, batch_size=1, sequence_length=1)
            for module, tensors in made.items():
                found, cache = state[module]["cache"], tensors["cache"]
                if found.shape[:2] + found.shape[3:] != cache.shape[:2] + cache.shape[3:]:
                    raise ValueError(f"the shape {tuple(found.shape)}")
            model._flow_lm_current_end(state)  # raises for a file without it
            return state
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InvalidRequest(
                f"The voice {name!r} cannot be used: its file is damaged.", param="voice"
            ) from error

    def _hear(self, path: Path) -> torch.Tensor:
        """(1, frames, width) of a recording, in host memory: 48 kB for 30 s.

        As in the library's `get_state_for_audio_prompt`.
        """
        model, rate = self.module, self.module.sample_rate
        audio, recorded_rate = audio_read(path)
        audio = convert_audio(
            audio[..., : int(MAX_SAMPLE_S * recorded_rate)], recorded_rate, rate, 1
        )
        try:
            heard = model.mimi.encode_to_latent(end_on_pause(audio, rate)[None].to(model.device))
        finally:
            # The library keeps the mask of the longest recording: 36 MB for 30 s.
            attention._CAUSAL_MASK_CACHE.clear()
        latents: torch.Tensor = heard.float().cpu()
        return latents


class _Decoder:
    """The codec, in the middle of one chunk."""

    def __init__(self, model: Any, most_frames: int) -> None:
        self._model = model
        self._steps = int(model.mimi.encoder_frame_rate / model.mimi.frame_rate)
        # The encoder has a cache as well, and does not run.
        self._state = init_states(model.mimi, batch_size=1, sequence_length=1)
        transformer = model.mimi.decoder_transformer
        for name, state in init_states(transformer, 1, most_frames * self._steps).items():
            self._state[f"decoder_transformer.{name}"] = state
        self._fade: torch.Tensor | None = torch.linspace(0, 1, int(model.sample_rate * FADE_S))

    def decode(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        """The samples of the next frames."""
        model, flow = self._model, self._model.flow_lm
        latents = torch.cat(list(frames), dim=1) * flow.emb_std + flow.emb_mean
        samples: torch.Tensor = model.mimi.decode_from_latent(latents, self._state)[0, 0]
        increment_steps(model.mimi, self._state, increment=self._steps * len(frames))
        if self._fade is not None:
            samples[: len(self._fade)] *= self._fade.to(samples)
            self._fade = None
        return samples


def _config_of(files: PocketFiles) -> Config:
    """The configuration with the tokenizer's file. Otherwise the library would ask the hub."""
    flow = dict(files.config["flow_lm"])
    flow["lookup_table"] = {**flow["lookup_table"], "tokenizer_path": str(files.tokenizer)}
    return Config(**{**files.config, "flow_lm": flow})


def _empty(config: Config, options: PocketOptions) -> Any:
    """The model without weights, as the library's `_from_pydantic_config_with_weights` builds it.

    That function reads a hub, and it configures the root logger.
    """
    given = options.temperature
    model = TTSModel._from_pydantic_config(
        config,
        temp=config.default_temperature if given is None else given,
        sampler_decode_steps=1,
        noise_clamp=None,
        eos_threshold=config.default_eos_threshold,
        origin=None,
    )
    width = config.mimi.inner_dim or config.mimi.seanet.dimension
    model.flow_lm.speaker_proj_weight = torch.nn.Parameter(
        torch.empty(config.flow_lm.transformer.d_model, width)
    )
    model.mimi = build_mimi(config.mimi)
    stamp_state_names(model)
    return model


def _drop_hearing(model: Any) -> None:
    model.flow_lm.speaker_proj_weight = None
    model.mimi.encoder = model.mimi.encoder_transformer = None
    if hasattr(model.mimi, "downsample"):
        model.mimi.downsample = None
