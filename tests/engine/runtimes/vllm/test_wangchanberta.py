"""Texts as WangchanBERTa was trained to read them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.runtimes.vllm.wangchanberta import SPACE, as_trained, reads_space_symbol

MASK = "<mask>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("วันนี้ อากาศดี", "วันนี้<_>อากาศดี"),
        ("  Hello   World\n\nBye ", "hello<_>world<_>bye"),
        ("Anbsp;amp;nbsp;B @.@ C", "a<_>&<_>b.c"),
        ("1 &lt; 2", "1<_><<_>2"),
        ("one<br />two", "one<_>two"),
        (r"a\nb", "a<_>b"),
        ("กาาาาาาา 5555", "กา<_>5"),
        ("กาาา 555", "กาาา<_>555"),
        ("hey() whats[;] up{*&} man(hey)", "hey<_>whats<_>up<_>man(hey)"),
        ("ไป (  กิน  ) มา", "ไป<_>(กิน)<_>มา"),
        ("", ""),
    ],
)
def test_a_text_is_rewritten(text: str, expected: str) -> None:
    assert as_trained(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("กิน <mask> แล้ว", "กิน<_><mask><_>แล้ว"),
        ("(<mask>) [ <mask>]", "(<mask>)<_>[<mask>]"),
        ("<mask>" * 5, "<mask>" * 5),
        ("\u0e3b<mask>\u0e3c", "\u0e3b<mask>\u0e3c"),
        ("ไม่มี", "ไม่มี"),
    ],
)
def test_a_mask_stays_where_it_is(text: str, expected: str) -> None:
    assert as_trained(text, MASK) == expected


def test_a_text_of_brackets_takes_no_second() -> None:
    began = time.process_time()
    for text in ("(" * 1_000_000, "(a" * 500_000, "()" * 500_000, "a" + "(" * 500_000 + ")" * 500):
        as_trained(text)
    assert time.process_time() - began < 5


@given(st.lists(st.text("กขา่้ A1()[ .\n", max_size=8), min_size=1, max_size=6))
def test_every_mask_stays_and_no_space_does(parts: list[str]) -> None:
    text = MASK.join(parts)
    found = as_trained(text, MASK)
    assert found.count(MASK) == len(parts) - 1
    assert " " not in found and "\n" not in found


def test_a_tokenizer_with_the_symbol_is_known(tmp_path: Path) -> None:
    assert not reads_space_symbol(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not reads_space_symbol(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\x0a\x03" + SPACE.encode())
    assert reads_space_symbol(tmp_path)
