"""The starter that reads Thai: a CamemBERT with a tokenizer of WangchanBERTa's kind.

Its files are those of `airesearch/wangchanberta-base-att-spm-uncased`: a SentencePiece model with
the symbol `<_>` for a space, and no `tokenizer.json`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import sentencepiece

from engine.starters.json_text import write_json
from engine.starters.language import EncoderShape, encoder_layers, layer_norm, write_model
from engine.starters.tensors import RandomTensors, Tensors

SPACE = "<_>"

_CORPUS = """
กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย
รถไฟออกจากสถานีหัวลำโพงตอนเช้า และถึงเชียงใหม่ตอนเย็น
วันนี้อากาศดีมาก ท้องฟ้าแจ่มใส ไม่มีฝน
ผมชอบกินข้าวผัดกับไข่ดาว แต่น้องสาวชอบก๋วยเตี๋ยว
เด็กนักเรียนอ่านหนังสือในห้องสมุดของโรงเรียนทุกวัน
เขาทำงานที่บริษัทแห่งหนึ่งในกรุงเทพฯ มาห้าปีแล้ว
ขอบคุณมากครับ สวัสดีค่ะ ยินดีที่ได้รู้จัก
ฝนตกหนักเมื่อคืนนี้ ทำให้ถนนลื่นและรถติดมาก
หัวรถจักรจอดรออยู่บนแท่นหมุน คนขับขอเปลี่ยนราง
ฃฅฆฌฎฏฐฑฒณธภศษฬฮ ฤๅ ๆ ฯ ๐๑๒๓๔๕๖๗๘๙ โปรด ปิติ ลุกขึ้น ผู้ใหญ่ ปี่ พิษณุโลก
the train stands on the turntable and waits, vex jfk bzq: 0123456789 (a-b) . ! ?
"""
"""The text from which the pieces are learned: Thai in all its letters, and a line of English."""

_SYMBOLS = 5
"""Tokens before those of SentencePiece: fairseq's four, and its own `<unk>` once more."""


def _write_tiny_camembert(folder: Path) -> None:
    pieces = _pieces()
    (folder / "sentencepiece.bpe.model").write_bytes(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    # SentencePiece's `<unk>` is among the five, and `<mask>` is the last.
    vocabulary = _SYMBOLS + processor.get_piece_size()
    shape = EncoderShape(positions=514)
    ids = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 1}
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
        "additional_special_tokens": ["<s>NOTUSED", "</s>NOTUSED", SPACE],
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CamembertTokenizer",
            **roles,
            # As RoBERTa's: positions begin after the padding's.
            "model_max_length": shape.positions - ids["pad_token_id"] - 1,
        },
    )
    config = {
        "architectures": ["CamembertForMaskedLM"],
        "model_type": "camembert",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        **ids,
    }
    write_model(folder, config, _tensors(RandomTensors(seed=9), shape, vocabulary))


def _pieces() -> bytes:
    """A SentencePiece model of some hundred pieces, the same at each call."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.strip().splitlines()),
        model_writer=written,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=[SPACE],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def _tensors(weights: RandomTensors, shape: EncoderShape, vocabulary: int) -> Tensors:
    hidden = shape.hidden
    encoder: Tensors = {
        # The head's logits have a spread of about 3, so that several tokens are likely.
        "embeddings.word_embeddings.weight": weights.normal(vocabulary, hidden, std=0.3),
        "embeddings.position_embeddings.weight": weights.normal(shape.positions, hidden, std=0.05),
        "embeddings.token_type_embeddings.weight": weights.normal(1, hidden, std=0.05),
        **layer_norm("embeddings.LayerNorm", hidden),
        **encoder_layers(weights, shape),
    }
    return {
        **{f"roberta.{name}": tensor for name, tensor in encoder.items()},
        "lm_head.dense.weight": weights.linear(hidden, hidden),
        "lm_head.dense.bias": np.zeros(hidden, np.float32),
        **layer_norm("lm_head.layer_norm", hidden),
        "lm_head.bias": weights.normal(vocabulary, std=0.5),
    }


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {"tiny-camembert": _write_tiny_camembert}
)
"""The function that writes each model into an empty folder, by the model's name."""
