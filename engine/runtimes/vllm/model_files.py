"""What the files and options of a model say: its bytes, its kind, and its command line."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.memory.block import Block, Estimate
from engine.runtimes.vllm.checkpoint import (
    Checkpoint,
    position_count,
    tokenizer_length,
)
from engine.runtimes.vllm.dtype import run_dtype
from engine.runtimes.vllm.modalities import limits, senses
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.recognition import CLASSIFIES
from engine.runtimes.vllm.rerank_format import RerankFormat, rerank_format
from engine.runtimes.vllm.wangchanberta import reads_space_symbol

LEAST_KV_BYTES = 64 * 2**20


class ModelFiles:
    """The folder of a model that is here, read for one device."""

    def __init__(self, model: ModelConfig, folder: Path, device_kind: str) -> None:
        """Reads nothing yet."""
        self.model = model
        self.folder = folder
        self.options = model.options_as(VllmOptions)
        self._on_cpu = device_kind == "cpu"
        self.dtype = run_dtype(model, device_kind)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            LoadFailed: there is none, or it cannot be read.

        """
        return Checkpoint(self.folder)

    @property
    def weights(self) -> list[Path]:
        """All safetensors of the folder."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def rerank_format(self) -> RerankFormat:
        """How a reranker reads a pair. Other models read each text alone."""
        if self.model.task != "rerank":
            return RerankFormat()
        return rerank_format(self.checkpoint.config, self.options)

    def check_labels(self) -> None:
        """Refuse a model whose labels do not fit its task, or its moderation.

        A label that nobody mapped would be flagged, or never, by chance.

        Raises:
            LoadFailed: with the labels in words.

        """
        model, options, labels = self.model, self.options, self.checkpoint.labels
        architectures = self.checkpoint.config["architectures"]
        classifies = any(str(each).endswith(CLASSIFIES) for each in architectures)
        count = len(labels)
        if model.task == "rerank" and classifies and count != 1:
            raise LoadFailed(f"{model.id}: a reranker has one label, this one has {count}")
        if options.moderation is None:
            return
        given, mapped = set(labels), options.moderation.categories.keys()
        for names, said in (
            (given - mapped, "it has no category for"),
            (mapped - given, "the model has no label"),
        ):
            if names:
                listed = ", ".join(sorted(map(repr, names)))
                raise LoadFailed(f"{model.id}: moderation.categories: {said} {listed}")

    def estimate(self, *, parkable: bool) -> Estimate:
        """What a load will take, by the headers of the safetensors.

        Raises:
            LoadFailed: the files cannot be read, or do not fit the options.

        """
        self.check_labels()
        checkpoint, dtype, expected = self.checkpoint, self.dtype, self.expected()
        expected["weights"] += checkpoint.rotary_bytes(dtype)
        if self._on_cpu and self.model.task == "generate":
            # A CPU kernel may keep its own form of the matrix that gives the logits beside it.
            expected["weights"] += checkpoint.embedding_bytes(dtype)
        if self.rerank_format.overrides:
            # vLLM makes one label of two rows of the output embedding. It is whole until then.
            expected["weights"] += checkpoint.embedding_bytes(dtype)
        nbytes = sum(expected.values())
        blocks = tuple(
            Block(name, size, parkable, scratch=name != "weights")
            for name, size in expected.items()
            if size
        )
        # Disk at 1 GB/s and a second of building. The first measured load replaces it.
        return Estimate(blocks=blocks, load_seconds=1.0 + nbytes / 1e9)

    def expected(self) -> dict[str, int]:
        """Bytes of each block by the files and the options."""
        checkpoint, options, dtype = self.checkpoint, self.options, self.dtype
        task = self.model.task
        kv_bytes = options.kv_cache or 0
        if not kv_bytes and checkpoint.has_kv_cache(task):
            tokens = 4 * checkpoint.max_model_len(options)
            kv_bytes = tokens * checkpoint.kv_bytes_per_token(dtype)
        return {
            "weights": checkpoint.weight_bytes(dtype, task),
            "kv_cache": kv_bytes,
            "loras": checkpoint.lora_bytes(options, dtype),
            "workspace": checkpoint.workspace_bytes(options, dtype, task) + self.media_bytes(),
        }

    def media_bytes(self, item_tokens: int | None = None) -> int:
        """What images and the like take on the device beside the weights.

        `item_tokens` are those of the largest image. Before the load they are unknown.
        """
        if not limits(self.options, senses(self.checkpoint.config)):
            return 0
        # Beside a GPU what is ready waits in host memory.
        ready_bytes = self.options.mm_processor_cache if self._on_cpu else 0
        return ready_bytes + self.checkpoint.media_bytes(self.options, self.dtype, item_tokens)

    @property
    def as_wangchanberta(self) -> bool:
        """Whether the model's texts are rewritten as WangchanBERTa's were."""
        chosen = self.options.preprocessing
        if chosen != "auto":
            return chosen == "wangchanberta"
        is_camembert = self.checkpoint.config.get("model_type") == "camembert"
        return is_camembert and reads_space_symbol(self.folder)

    def stamp(self) -> Any:
        """What tells one reading of the files from another."""
        files = (*self.weights, self.folder / "config.json")
        stats = [(path, path.stat()) for path in files]
        return (self.model, *((str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p, s in stats))

    def command_line(self, kv_bytes: int) -> list[str]:
        """The arguments of `vllm serve` for the model.

        Raises:
            LoadFailed: the options ask for what the checkpoint has not.

        """
        model, options, on_cpu = self.model, self.options, self._on_cpu
        eager = on_cpu if options.enforce_eager is None else options.enforce_eager
        line = [
            "--model", str(self.folder),
            "--served-model-name", model.id,
            "--dtype", self.dtype,
            "--seed", str(options.seed),
            "--max-num-seqs", str(options.max_num_seqs),
            "--load-format", "roundhouse",
            "--runner", "generate" if model.task == "generate" else "pooling",
            # vLLM only checks that this share of the GPU is free. The ledger has done that.
            "--gpu-memory-utilization", "0.001",
            "--no-enable-log-requests",
            "--enable-prompt-tokens-details",
            "--no-use-tqdm-on-load",
        ]  # fmt: skip
        if not on_cpu:
            # Without a size vLLM would measure what is free, and clear the graphs of all engines.
            kv_bytes = kv_bytes or LEAST_KV_BYTES
        if kv_bytes:
            line += ["--kv-cache-memory-bytes", str(kv_bytes)]
        if eager:
            line.append("--enforce-eager")
        if not on_cpu:
            line += ["--worker-cls", "engine.runtimes.vllm.cuda_memory.ParkingWorker"]
        if options.tool_call_parser:
            line += ["--enable-auto-tool-choice", "--tool-call-parser", options.tool_call_parser]
        pair = self.rerank_format
        overrides = {**_matryoshka(options), **pair.overrides}
        if overrides:
            line += ["--hf-overrides", json.dumps(overrides)]
        pooler = _pooler(options)
        if pooler and model.task == "embed":
            line += ["--pooler-config", json.dumps(pooler)]
        for flag, value in (
            ("--max-model-len", self._max_model_len()),
            ("--max-num-batched-tokens", options.max_num_batched_tokens),
            ("--quantization", options.quantization),
            ("--reasoning-parser", options.reasoning_parser),
            ("--chat-template", pair.template or options.chat_template),
        ):
            if value is not None:
                line += [flag, str(value)]
        if senses(self.checkpoint.config):
            line += ["--limit-mm-per-prompt", json.dumps(options.media_counts)]
            line += ["--mm-processor-cache-gb", str(options.mm_processor_cache / 2**30)]
            if options.mm_processor_kwargs:
                line += ["--mm-processor-kwargs", json.dumps(dict(options.mm_processor_kwargs))]
        if options.chat_template_kwargs:
            kwargs = json.dumps(dict(options.chat_template_kwargs))
            line += ["--default-chat-template-kwargs", kwargs]
        if options.takes_loras:
            line += ["--enable-lora", "--max-loras", str(options.max_loras)]
            line += ["--max-lora-rank", str(options.max_lora_rank)]
            line += ["--max-cpu-loras", str(options.host_loras)]
        return line

    def _max_model_len(self) -> int | None:
        """The length for vLLM; None: it asks the checkpoint, and finds the right one.

        vLLM takes all positions of a RoBERTa for usable. A text with more tokens than there are
        would read beyond the end of a matrix.

        Raises:
            LoadFailed: the options ask for more than there are.

        """
        config, asked = self.checkpoint.config, self.options.max_model_len
        usable, said = position_count(config), config.get("max_position_embeddings")
        if usable is None or usable == said:
            return asked
        if asked is not None and asked > usable:
            raise LoadFailed(
                f"{self.model.id}: options.max_model_len: the model has {usable} positions, "
                f"not {asked}"
            )
        return asked or min(usable, tokenizer_length(self.folder) or usable)


def _matryoshka(options: VllmOptions) -> dict[str, Any]:
    """What the options say of the `dimensions` of embeddings, over what the checkpoint says."""
    said: dict[str, Any] = {}
    if options.is_matryoshka is not None:
        said["is_matryoshka"] = options.is_matryoshka
    if options.matryoshka_dimensions is not None:
        said["matryoshka_dimensions"] = list(options.matryoshka_dimensions)
    return said


def _pooler(options: VllmOptions) -> dict[str, Any]:
    """What the options say of how an embedding is made, over what the checkpoint says."""
    said: dict[str, Any] = {}
    if options.pooling is not None:
        said["seq_pooling_type"] = options.pooling.upper()
    if options.normalize is not None:
        said["use_activation"] = options.normalize
    return said
