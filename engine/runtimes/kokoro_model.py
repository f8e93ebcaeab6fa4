"""Kokoro's module: built and checked, spoken with, stopped within a sentence.

Importing this module imports torch, spaCy and kokoro.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kokoro import KModel, KPipeline
from torch.overrides import TorchFunctionMode

from engine.errors import InvalidRequest, LoadFailed
from engine.peak import TensorPeak
from engine.process import GATE
from engine.requests import Event, Speech, Word, WorkingMemory
from engine.runtimes.kokoro_phonemes import MAX_PHONEMES, Chunk, Phonemizer

if TYPE_CHECKING:
    from engine.runtimes.kokoro import Utterance

SAMPLE_RATE = 24_000
"""Hertz; fixed in Kokoro's vocoder."""

STYLE_WIDTH = 256
"""Of a voice: 128 numbers for the decoder, 128 for the prosody."""

PREFIX = "module."
"""Of the keys of a checkpoint that was saved from several GPUs, as Kokoro-82M's was."""


class Cancelled(BaseException):
    """The run was told to stop. Not an `Exception`: library code must not take it for its own."""


def stored_parts(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by part and name, on the meta device: no weight is read.

    Raises:
        LoadFailed: it is no checkpoint of Kokoro, or holds more than tensors.

    """
    try:
        parts = torch.load(path, map_location="meta", weights_only=True)
        return {
            part: {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadFailed(f"{path.name}: cannot read: {reason}") from error


class VoiceModel:
    """One loaded model and the voices it was asked for so far."""

    def __init__(self, config: Path, weights: Path, device: str) -> None:
        """Build and fill the module. Call inside `GATE.exclusive()`.

        Raises:
            LoadFailed: a weight is missing.

        """
        stored = stored_parts(weights)
        # The repository is named only to keep the library quiet; with both paths it asks nobody.
        module = KModel(repo_id="hexgrad/Kokoro-82M", config=str(config), model=str(weights))
        for part, child in module.named_children():
            missing = sorted(child.state_dict().keys() - stored.get(part, {}).keys())
            if missing:
                # The library would leave them random.
                raise LoadFailed(f"{weights.name}: the checkpoint lacks {part}.{missing[0]}")
        if device != "cpu":
            with GATE.yielded():
                module.to(device)
        self.module = module.eval()
        self.device = device
        self.watch: Callable[[], None] | None = None
        """Called before every submodule of a run."""
        for each in module.modules():
            each.register_forward_pre_hook(self._before_module)
        self.measured: set[str] = set()
        """Shapes whose working memory was measured since the load."""
        self._packs: dict[Path, torch.Tensor] = {}

    def _before_module(self, _module: Any, _args: Any) -> None:
        if self.watch is not None:
            self.watch()

    def part_bytes(self) -> dict[str, int]:
        """Device bytes of each part."""
        return {
            name: sum(tensor.untyped_storage().nbytes() for tensor in _tensors(part))
            for name, part in self.module.named_children()
        }

    def weights(self) -> Iterator[torch.Tensor]:
        """Every weight."""
        return _tensors(self.module)

    def style(self, voices: Sequence[tuple[Path, float]]) -> torch.Tensor:
        """The style of a voice, or the weighted mean of several: (lengths, 1, `STYLE_WIDTH`).

        Raises:
            InvalidRequest: a file is no voice of this model.

        """
        packs = torch.stack([self._pack(path) for path, _ in voices])
        weights = [weight for _, weight in voices]
        if len(set(weights)) == 1:
            return packs.mean(dim=0)  # bit for bit as the library blends
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


class Run:
    """One text spoken by one model. `execute` on the model's thread, `cancel` from any."""

    def __init__(
        self,
        model: VoiceModel,
        phonemizer: Phonemizer,
        utterance: Utterance,
        shape: str,
        emit: Callable[[Event], None],
    ) -> None:
        self._model = model
        self._phonemizer = phonemizer
        self._utterance = utterance
        self._shape = shape
        self._emit = emit
        self._cancelled = threading.Event()
        self._peak_bytes = 0

    def cancel(self) -> None:
        """Stop at the next module; nothing if it has ended."""
        self._cancelled.set()

    def execute(self) -> None:
        """Emit each sentence as it is spoken. Returns early if cancelled.

        Raises:
            InvalidRequest: there is nothing in the text that can be spoken.
            Exception: what the library raised.

        """
        model, utterance = self._model, self._utterance
        # The noise in the vocoder; one stream for the whole text, as after `torch.manual_seed`.
        generator = torch.Generator(model.device).manual_seed(utterance.seed)
        spoken = 0  # samples
        try:
            style = model.style(utterance.voices)
            model.watch = self._check
            for sentence in utterance.sentences:
                for chunk in self._phonemizer.chunks(sentence, utterance.language):
                    self._check()
                    with GATE.step(), self._peak(), _RandomFrom(generator):
                        output = model.module(
                            chunk.phonemes,
                            style[len(chunk.phonemes) - 1],
                            utterance.speed,
                            return_output=True,
                        )
                    words = self._words(chunk, output.pred_dur, spoken / SAMPLE_RATE)
                    self._emit(Speech(output.audio.numpy(), SAMPLE_RATE, words))
                    spoken += len(output.audio)
            if not spoken:
                raise InvalidRequest("There is nothing in the text to speak.", param="input")
            if self._shape not in model.measured:
                model.measured.add(self._shape)
                self._emit(WorkingMemory(self._peak_bytes))
        except Cancelled:
            return
        except Exception as error:
            # The frames hold tensors for as long as somebody holds the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            model.watch = None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        GATE.pause()

    @contextmanager
    def _peak(self) -> Iterator[None]:
        """Measure the working memory of a shape once: it costs a tenth of the time on a CPU."""
        model = self._model
        if self._shape in model.measured:
            yield
            return
        if model.device == "cpu":
            with TensorPeak(model.weights()) as peak:
                yield
            nbytes = peak.nbytes
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            nbytes = torch.cuda.max_memory_allocated() - before
        self._peak_bytes = max(self._peak_bytes, nbytes)

    def _words(self, chunk: Chunk, durations: torch.Tensor, offset_s: float) -> tuple[Word, ...]:
        """When each word is spoken: the library's reckoning, from the predicted durations."""
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


class _RandomFrom(TorchFunctionMode):  # type: ignore[misc]
    """Lets the vocoder draw from a generator of the run; it asks torch's global one.

    That one belongs to everybody: what others draw meanwhile would change the samples.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand:
            kwargs = {**kwargs, "generator": self._generator}
        elif func is torch.randn_like:
            # In the order of its memory, as torch does it: the vocoder's is transposed.
            return torch.empty_like(args[0]).normal_(generator=self._generator)
        return func(*args, **kwargs)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
