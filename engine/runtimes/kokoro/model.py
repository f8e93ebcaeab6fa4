"""Kokoro's module and its runs. A run stops within a sentence.

Importing this module imports torch, spaCy and kokoro.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

from engine.errors import InvalidRequest, LoadFailed, reason
from engine.events import Event, Speech, Word
from engine.process.gate import GATE
from engine.process.randomness import draw_by_thread, seeded
from engine.runtimes.common.speech import NOTHING_TO_SPEAK
from engine.runtimes.common.torch_run import TorchParts, TorchRun, children_of
from engine.runtimes.kokoro.phonemes import MAX_PHONEMES, Chunk, Phonemizer
from engine.runtimes.kokoro.utterance import Utterance
from kokoro import KModel, KPipeline

SAMPLE_RATE = 24_000
"""Hertz. Kokoro's vocoder has no other rate."""

STYLE_WIDTH = 256
"""Numbers of a voice: 128 for the decoder, and 128 for the prosody."""

PREFIX = "module."
"""Prefix of the keys in a checkpoint that was saved from several GPUs, such as Kokoro-82M's."""

NORMS = ".weight_g"
"""Suffix of a checkpoint's weight norms, which are multiplied into the weights."""

STYLED = re.compile(r"(?:^|\.)(?:norm[12]|adain[12]\.\d+)\.fc\.bias$")
"""The bias of a projection in an AdaIN: two numbers for each channel that it normalises."""

draw_by_thread("kokoro.istftnet")


def stored_parts(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by part and name, on the meta device: no weight is read.

    The InstanceNorm of each AdaIN is among them even if the checkpoint lacks it, as Kokoro-82M's
    does: the library leaves it at 1 and 0, and the module has it.

    Raises:
        LoadFailed: it is not a checkpoint of Kokoro, or it holds more than tensors.

    """
    try:
        parts = torch.load(path, map_location="meta", weights_only=True)
        return {
            part: _with_norms({name.removeprefix(PREFIX): each for name, each in tensors.items()})
            for part, tensors in parts.items()
        }
    except Exception as error:
        raise LoadFailed(f"{path.name}: cannot read: {reason(error)}") from error


class VoiceModel(TorchParts):
    """One model, and the voices that requests have asked for so far."""

    def __init__(self, config: Path, weights: Path, device: str) -> None:
        """Build and fill the module, in host memory. Call inside `GATE.exclusive()`.

        Raises:
            LoadFailed: a weight is missing.

        """
        stored = stored_parts(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's use of torch is not the operator's
            # The repository is named only to keep the library quiet. With both paths it opens no
            # connection.
            module = KModel(repo_id="hexgrad/Kokoro-82M", config=str(config), model=str(weights))
        for part, child in module.named_children():
            missing = sorted(child.state_dict().keys() - stored.get(part, {}).keys())
            if missing:
                # The library would leave them random.
                raise LoadFailed(f"{weights.name}: the checkpoint lacks {part}.{missing[0]}")
        with GATE.yielded():
            _multiply_norms(module)
        super().__init__(children_of(module.eval()), device)
        self.module = module
        self._packs: dict[Path, torch.Tensor] = {}

    def park(self, blocks: Collection[str]) -> None:
        """Take parts off the device. The voices go with them, as they are quickly read again."""
        self._packs.clear()
        super().park(blocks)

    def style(self, voices: Sequence[tuple[Path, float]]) -> torch.Tensor:
        """The style of a voice, or the weighted mean of several: (lengths, 1, `STYLE_WIDTH`).

        Raises:
            InvalidRequest: a file is not a voice of this model.

        """
        packs = torch.stack([self._pack(path) for path, _ in voices])
        weights = [weight for _, weight in voices]
        if len(set(weights)) == 1:
            return packs.mean(dim=0)  # to the bit as the library blends
        shares = torch.tensor(weights) / sum(weights)
        return (packs * shares.view(-1, 1, 1, 1)).sum(dim=0)

    def _pack(self, path: Path) -> torch.Tensor:
        if path not in self._packs:
            try:
                pack = torch.load(path, map_location="cpu", weights_only=True)
                if tuple(pack.shape) != (MAX_PHONEMES, 1, STYLE_WIDTH):
                    raise ValueError(f"its shape is {tuple(pack.shape)}")
            except Exception as error:
                raise InvalidRequest(
                    f"The voice {path.stem!r} cannot be used: {path.name} is damaged.",
                    param="voice",
                ) from error
            self._packs[path] = pack
        return self._packs[path]


class KokoroRun(TorchRun):
    """One text spoken by one model."""

    def __init__(
        self,
        model: VoiceModel,
        phonemizer: Phonemizer,
        utterance: Utterance,
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(model, shape, emit)
        self._voice_model = model
        self._phonemizer = phonemizer
        self._utterance = utterance

    def _run(self) -> None:
        model, utterance = self._voice_model, self._utterance
        style = model.style(utterance.voices)
        spoken = 0  # samples
        # The vocoder's noise is one stream for the whole text, as after `torch.manual_seed`.
        with GATE.step(), seeded(utterance.seed), self._measured():
            for sentence in utterance.sentences:
                for chunk in self._phonemizer.chunks(sentence, utterance.language):
                    self.check()
                    output = model.module(
                        chunk.phonemes,
                        style[len(chunk.phonemes) - 1],
                        utterance.speed,
                        return_output=True,
                    )
                    words = self._words(chunk, output.pred_dur, spoken / SAMPLE_RATE)
                    # A copy, so that queued events do not keep the library's tensor.
                    self._emit(Speech(output.audio.numpy().copy(), SAMPLE_RATE, words))
                    spoken += len(output.audio)
            if not spoken:
                raise InvalidRequest(NOTHING_TO_SPEAK, param="input")

    def _words(self, chunk: Chunk, durations: torch.Tensor, offset_s: float) -> tuple[Word, ...]:
        """When each word is spoken, as the library computes it from the predicted durations."""
        if not self._utterance.word_times:
            return ()
        tokens = list(chunk.tokens)
        KPipeline.join_timestamps(tokens, durations)
        return tuple(
            Word(token.text, offset_s + token.start_ts, offset_s + token.end_ts)
            for token in tokens
            if token.start_ts is not None
            and token.end_ts is not None
            and any(character.isalnum() for character in token.text)
        )


def _with_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a part with those of the InstanceNorm of each AdaIN."""
    norms = {}
    for name, bias in tensors.items():
        if STYLED.search(name):
            norm = f"{name.removesuffix('.fc.bias')}.norm"
            norms[f"{norm}.weight"] = norms[f"{norm}.bias"] = bias[: len(bias) // 2]
    return norms | tensors


def _multiply_norms(module: torch.nn.Module) -> None:
    """Make one parameter of each weight that is stored as a direction and a length.

    The library would compute it before every call, to the same bits, and keep the result beside the
    two. That is twice the memory, and half of it is not a parameter, so it would never leave the
    device.
    """
    for each in list(module.modules()):
        if any(isinstance(hook, WeightNorm) for hook in each._forward_pre_hooks.values()):
            remove_weight_norm(each)
