"""Builds Bark with transformers, and runs it to speak.

Importing this module imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BarkModel, BarkProcessor

from engine.errors import LoadFailed
from engine.events import Speech
from engine.process.randomness import draw_by_thread
from engine.requests import SpeechRequest
from engine.runtimes.bark.options import BarkOptions
from engine.runtimes.common.speech import cannot_speak
from engine.runtimes.common.speech_run import Speaker
from engine.runtimes.common.utterance import Utterance

draw_by_thread("transformers.generation.utils", "transformers.models.bark.modeling_bark")
transformers.utils.logging.disable_progress_bar()


class BarkSpeaker(Speaker):
    """Bark's three language models and its codec. Every sentence is one piece of audio."""

    def __init__(self, folder: Path, options: BarkOptions, device: str) -> None:
        """Build and fill every part, in host memory. Call inside `GATE.exclusive()`.

        Raises:
            LoadFailed: a weight is missing.
            Exception: any error of the library.

        """
        self._processor = BarkProcessor.from_pretrained(folder, local_files_only=True)
        model, told = BarkModel.from_pretrained(
            folder,
            dtype=getattr(torch, options.dtype),
            # transformers reads pickled weights with `weights_only`.
            use_safetensors=any(folder.glob("*.safetensors")),
            local_files_only=True,
            output_loading_info=True,
        )
        # The library fills missing weights with random numbers.
        if told["missing_keys"]:
            raise LoadFailed(f"{folder.name}: the checkpoint lacks {min(told['missing_keys'])}")
        super().__init__(model.eval(), device)

    def check(self, utterance: Utterance) -> None:
        """Refuse a sentence without a known token."""
        tokenizer = self._processor.tokenizer
        for sentence in utterance.sentences:
            tokens = tokenizer(sentence, add_special_tokens=False, verbose=False).input_ids
            if set(tokens) <= {tokenizer.unk_token_id}:
                raise cannot_speak(sentence)

    def speak(self, request: SpeechRequest, utterance: Utterance) -> Iterator[Speech]:  # noqa: ARG002
        """Each sentence as the model speaks it from the voice's prompt."""
        sample_rate = self.module.generation_config.sample_rate
        for sentence in utterance.sentences:
            inputs = self._processor(sentence, voice_preset=utterance.voice).to(self.device)
            audio = self.module.generate(**inputs)
            yield Speech(audio.float().cpu().numpy().reshape(-1).astype(np.float32), sample_rate)
