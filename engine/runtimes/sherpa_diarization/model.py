"""A loaded pair of models: onnxruntime finds turns, sherpa-onnx compares voices.

Importing this module imports both libraries. They have an onnxruntime each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import sherpa_onnx
from numpy.typing import NDArray

from engine.errors import LoadFailed
from engine.events import Samples
from engine.runtimes.sherpa_diarization.files import RATE, check_embedding, numbers_of
from engine.runtimes.sherpa_diarization.turns import Labels, Shape

CPU = ["CPUExecutionProvider"]

SESSION_SETTINGS = "EnableCpuMemArena=0\nSessionConfig.session.intra_op.allow_spinning=0\n"
"""By default onnxruntime keeps the memory of a run, and its threads spin."""


class DiarizationModel:
    """Two models. One thread uses them; any thread may call `stop`."""

    def __init__(self, segmentation: Path, embedding: Path, threads: int) -> None:
        """Load both files.

        Raises:
            LoadFailed: one is no such model.

        """
        self.run_options = onnxruntime.RunOptions()
        self._session = onnxruntime.InferenceSession(segmentation, _options(threads), CPU)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.shape = Shape.of(
            numbers_of("segmentation", metadata, segmentation.name), segmentation.name
        )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or not outputs:
            raise LoadFailed(f"{segmentation.name}: it has other inputs than samples")
        self._input, self._output = inputs[0].name, outputs[0].name
        check_embedding(_metadata(embedding), embedding.name)
        with tempfile.NamedTemporaryFile("w", suffix=".config") as settings:
            settings.write(SESSION_SETTINGS)
            settings.flush()
            self._extractor = sherpa_onnx.SpeakerEmbeddingExtractor(
                sherpa_onnx.SpeakerEmbeddingExtractorConfig(
                    model=str(embedding), num_threads=threads, provider=f"cpu:{settings.name}"
                )
            )

    def stop(self) -> None:
        """Make the current run of the segmentation fail soon."""
        self.run_options.terminate = True

    def segment(self, samples: Samples) -> Labels:
        """Who speaks in each frame of a window, which is padded to its length."""
        window = np.zeros((1, 1, self.shape.window), np.float32)
        window[0, 0, : len(samples)] = samples
        (scores,) = self._session.run([self._output], {self._input: window}, self.run_options)
        if scores.ndim != 3 or scores.shape[2] != len(self.shape.powerset):
            raise LoadFailed("the segmentation model gives other scores than its metadata says")
        return self.shape.labels(scores[0])

    def embed(self, pieces: Sequence[Samples]) -> NDArray[np.float32] | None:
        """The numbers of a voice, of length 1; None where there is too little of it."""
        stream = self._extractor.create_stream()
        for piece in pieces:
            stream.accept_waveform(RATE, piece)
        stream.input_finished()
        if not self._extractor.is_ready(stream):
            return None
        numbers = np.array(self._extractor.compute(stream), np.float32)
        length = float(np.linalg.norm(numbers))
        return numbers / length if np.isfinite(length) and length > 0 else None

    @staticmethod
    def cluster(voices: NDArray[np.float32], threshold: float) -> list[int]:
        """A number for each of the voices, the same for those of one speaker: (voices, numbers).

        Agglomerative clustering with complete linkage over cosine distances.
        """
        config = sherpa_onnx.FastClusteringConfig(num_clusters=-1, threshold=threshold)
        return [int(each) for each in sherpa_onnx.FastClustering(config)(voices)]


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return options


def _metadata(path: Path) -> Mapping[str, str]:
    options = _options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, CPU)
    metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata
