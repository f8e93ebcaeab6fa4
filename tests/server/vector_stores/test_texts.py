"""Texts of files, their tokens, and how they are cut."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from server.vector_stores import document_text as module
from server.vector_stores.chunking import Chunking, passages
from server.vector_stores.document_text import UnreadableFile, document_text
from server.vector_stores.html_text import html_text
from server.vector_stores.tokens import Tokens
from tests.server.vector_stores.pdf import pdf

PAGE = """<!DOCTYPE html><html><head><title>The &amp; yard</title>
<style>p { color: red }</style><script>alert("x < y")</script></head>
<body><h1>Turn<b>table</b></h1><p>It  turns
 slowly.</p><ul><li>one<li>two</ul><table><tr><td>a</td><td>b</td></tr></table>
<pre>  kept
   so</pre><img src=x alt="A train"><noscript>no</noscript></body></html>"""


def kept(folder: Path, data: bytes) -> Path:
    path = folder / "file-1"
    path.write_bytes(data)
    return path


def test_html_is_what_a_reader_sees() -> None:
    text = html_text(PAGE)
    read = "The & yard Turntable It turns slowly. - one - two a b kept so A train"
    assert text.split() == read.split()
    assert text.startswith("The & yard\n\nTurntable\n\nIt turns slowly.\n\n- one\n- two\n")
    assert "  kept\n   so" in text
    assert "alert" not in text
    assert "color" not in text
    assert html_text("<p>never <b>closed <div>a &lt b") == "never closed\na < b"


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "Grüße\r\nไทย".encode(), "Grüße\nไทย"),
        ("a.txt", b"\xef\xbb\xbfmarked", "marked"),
        ("a.md", "# wide".encode("utf-16"), "# wide"),
        ("a.bin", b"{}", "{}"),
        ("a.HTML", b"<p>one<p>two", "one\n\ntwo"),
        ("page", b"  <!doctype HTML><p>one", "one"),
        ("a.pdf", pdf("Hello PDF", "Second page"), "Hello PDF\n\nSecond page\n\n"),
    ],
)
def test_each_kind_of_file_has_its_text(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    assert document_text(kept(tmp_path, data), name) == text


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"PK\x03\x04\x00\x00", "unsupported_file", "UTF-8"),
        (b"caf\xe9 in Latin-1", "unsupported_file", "UTF-8"),
        (b"\x00\x01", "unsupported_file", "UTF-8"),
        (b" \n\t ", "invalid_file", "no text"),
        (b"", "invalid_file", "no text"),
        (b"%PDF-1.7 and then nothing", "invalid_file", "PDF cannot be read"),
    ],
)
def test_other_files_are_refused_with_a_reason(
    tmp_path: Path, data: bytes, code: str, words: str
) -> None:
    with pytest.raises(UnreadableFile, match=words) as error:
        document_text(kept(tmp_path, data), "a.pdf")
    assert error.value.code == code
    assert str(tmp_path) not in error.value.message


def test_a_pdf_that_takes_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 600\n")
    endless.chmod(0o700)
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(sys, "executable", str(endless))
    with pytest.raises(UnreadableFile, match="could not be read in"):
        document_text(kept(tmp_path, pdf("text")), "a.pdf")


def test_a_pdf_that_takes_all_memory_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(UnreadableFile, match="too much memory"):
        document_text(kept(tmp_path, pdf("text")), "a.pdf")


def test_a_page_that_takes_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.5)
    with pytest.raises(UnreadableFile, match="could not be read in"):
        document_text(kept(tmp_path, b"<p>text" + b"<!--" * 50_000), "a.html")


def test_a_long_page_reads_as_a_short_one(tmp_path: Path) -> None:
    page = PAGE + "<p>ไทย é 💩</p>" * 2000
    assert len(page) > module.MAX_HTML_CHARS
    assert document_text(kept(tmp_path, page.encode()), "a.html") == html_text(page)


def words(text: str) -> Tokens:
    """A tokenizer that knows the words of a text."""
    vocabulary = {word: index for index, word in enumerate(sorted({*text.lower().split(), "?"}))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokens(tokenizer, None, has_prompts=False)


def test_passages_have_so_many_tokens_and_overlap() -> None:
    text = " ".join(f"word{i}" for i in range(1000))
    found = passages(text, words(text).spans(text), Chunking(100, 20))
    assert all(len(passage.split()) <= 100 for passage in found)
    assert found[0].split()[-20:] == found[1].split()[:20]
    seen = [word for passage in found for word in passage.split()]
    assert set(seen) == set(text.split())
    assert passages(text, words(text).spans(text), Chunking(1000, 500)) == [text]


def test_passages_end_at_paragraphs_and_sentences() -> None:
    sentence = "It turns so slowly. "
    text = sentence * 20 + "\n\n" + sentence * 20
    found = passages(text, words(text).spans(text), Chunking(100, 0))
    assert found[0] == (sentence * 20).strip()
    text = sentence * 60
    found = passages(text, words(text).spans(text), Chunking(101, 0))
    assert all(passage.endswith(".") for passage in found)
    assert sum(len(passage.split()) for passage in found) == 240


def test_long_texts_are_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"Wörd{i}" for i in range(5000))
    whole = words(text).spans(text)
    monkeypatch.setattr("server.vector_stores.tokens._PIECE_CHARS", 1000)
    assert words(text).spans(text) == whole
    assert len(whole) == 5000
    assert [text[a:b] for a, b in zip(whole.begins, whole.ends, strict=True)] == text.split()


def test_without_a_tokenizer_tokens_are_approximate() -> None:
    spans = Tokens(None, None, has_prompts=False).spans("abcdefgh, ไทย")
    assert len(spans) == 2 + 1 + 3
    unbroken = "x" * 10_000
    found = passages(
        unbroken, Tokens(None, None, has_prompts=False).spans(unbroken), Chunking(100, 50)
    )
    assert found[0] == "x" * 400
    assert len(found) == 49
