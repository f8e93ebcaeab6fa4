"""The sample models through a server: what they say is right, also beside others and after a swap.

The references are independent: transformers' own generation and pooling, and recordings with
their transcripts.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import yaml

from engine.samples.registry import SAMPLES, ensure_sample
from engine.starters.chat_templates import QWEN_TEMPLATE
from server.bench.quality.ranks import rank_correlation
from server.bench.quality.recordings import clips
from server.bench.quality.sentences import PAIRS, QUESTIONS, SPOKEN
from server.bench.quality.words import matched_words, normal_words, word_error_rate
from server.settings import STARTER_CONFIG
from tests.server.clients.test_programs import needs_node, run_node, run_pytest
from tests.server.real import Server

pytestmark = pytest.mark.slow

CHAT, EMBED, HEAR, SPEAK = "smollm2-135m", "minilm-l6-v2", "whisper-base", "kokoro-82m"
LOW, HIGH = "jm_kumo", "jf_alpha"
TOKENS = 20

SPEAKERS = {
    "id": "speakers",
    "runtime": "sherpa_diarization",
    "task": "diarize",
    "source": "starter:tiny-diarization",
}
"""Not trained, but it tells voices apart by their pitch."""


@pytest.fixture(scope="module")
def server(sample_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The configuration of the samples, with one of its starters."""
    home = tmp_path_factory.mktemp("home")
    document = yaml.safe_load(STARTER_CONFIG.with_name("samples.yaml").read_text())
    wanted = {*SAMPLES, "tiny-sdxl-turbo"}
    document["models"] = [model for model in document["models"] if model["id"] in wanted]
    document["models"].append(SPEAKERS)
    (home / "config.yaml").write_text(yaml.safe_dump(document))
    server = Server(
        home, "--config", str(home / "config.yaml"), ROUNDHOUSE_CACHE_DIR=str(sample_cache)
    )
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(sample_cache: Path) -> list[str]:
    """transformers' own greedy answers to the questions, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_sample(CHAT, sample_cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = found[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def ask(sdk: openai.OpenAI, question: str, **more: Any) -> str:
    answer = sdk.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=TOKENS,
        **{"temperature": 0, **more},
    )
    return answer.choices[0].message.content or ""


def ask_at_once(sdk: openai.OpenAI) -> list[str]:
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return list(pool.map(lambda question: ask(sdk, question), QUESTIONS))


def embed(sdk: openai.OpenAI, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    answer = sdk.embeddings.create(model=EMBED, input=list(texts))
    return np.array([each.embedding for each in answer.data])


def speak(sdk: openai.OpenAI, text: str, voice: str = "alloy") -> bytes:
    return sdk.audio.speech.create(
        model=SPEAK, voice=voice, input=text, response_format="wav"
    ).content


def joined(wavs: Sequence[bytes], pause_s: float) -> bytes:
    """One file of all, each with a silence behind it."""
    pieces, found = [], io.BytesIO()
    for wav in wavs:
        with wave.open(io.BytesIO(wav)) as file:
            form = file.getparams()
            pieces.append(file.readframes(file.getnframes()))
    silence = bytes(int(pause_s * form.framerate) * form.sampwidth * form.nchannels)
    with wave.open(found, "wb") as file:
        file.setparams(form._replace(nframes=0))
        file.writeframes(b"".join(piece + silence for piece in pieces))
    return found.getvalue()


def hear(sdk: openai.OpenAI, wav: bytes, **more: Any) -> str:
    answer = sdk.audio.transcriptions.create(model=HEAR, file=("a.wav", wav), temperature=0, **more)
    return str(answer.text)


class TestFolders:
    def test_a_card_says_whose_it_is_and_under_which_licence(self, sample_cache: Path) -> None:
        for name, sample in SAMPLES.items():
            _, head, body = (
                (ensure_sample(name, sample_cache) / "README.md").read_text().split("---\n", 2)
            )
            card = yaml.safe_load(head)
            assert card["license"] == sample.licence
            assert card["base_model"] == sample.origin
            assert sample.changes in body

    def test_kokoro_has_the_published_number_of_weights(self, sample_cache: Path) -> None:
        """hexgrad/Kokoro-82M: 81,763,410 numbers, none of AdaIN's untrained norms among them."""
        import torch

        parts = torch.load(
            ensure_sample(SPEAK, sample_cache) / "kokoro-v1_0.pth", map_location="meta"
        )
        tensors = [item for part in parts.values() for item in part.items()]
        assert sum(each.numel() for _, each in tensors) == 81_763_410
        assert not any(".norm." in name for name, _ in tensors)

    def test_the_chat_template_is_the_published_one_where_no_tool_is_named(
        self, sample_cache: Path
    ) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(ensure_sample(CHAT, sample_cache))
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
            " Face<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes?"
            "<|im_end|>\n"
        )
        system = [{"role": "system", "content": "Be brief."}, *turns]
        rendered = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
        assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert "SmolLM" not in QWEN_TEMPLATE


class TestLanguage:
    def test_it_knows_the_capital_of_france(self, sdk: openai.OpenAI) -> None:
        assert "Paris" in ask(sdk, QUESTIONS[0], temperature=openai.omit)

    def test_each_token_is_that_of_transformers(
        self, sdk: openai.OpenAI, expected: list[str]
    ) -> None:
        assert [ask(sdk, question) for question in QUESTIONS] == expected

    def test_so_it_is_in_a_batch_beside_other_models(
        self, sdk: openai.OpenAI, expected: list[str]
    ) -> None:
        with ThreadPoolExecutor(2) as pool:
            embedded = pool.submit(embed, sdk, SPOKEN)
            spoken = pool.submit(speak, sdk, SPOKEN[0])
            assert ask_at_once(sdk) == expected
            assert len(embedded.result()) == len(SPOKEN)
            assert spoken.result()

    def test_so_it_is_after_a_swap(
        self, server: Server, sdk: openai.OpenAI, expected: list[str]
    ) -> None:
        url = f"{server.url}/v1/engine/models/{CHAT}/park"
        httpx.post(url, timeout=180).raise_for_status()
        assert ask_at_once(sdk) == expected

    def test_a_call_that_is_asked_for_has_valid_arguments(self, sdk: openai.OpenAI) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        }
        answer = sdk.chat.completions.create(
            model=CHAT,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[{"type": "function", "function": {"name": "weather", "parameters": schema}}],
            tool_choice="required",
            max_completion_tokens=60,
            temperature=0,
        )
        calls = answer.choices[0].message.tool_calls
        assert calls and calls[0].type == "function"
        jsonschema.validate(json.loads(calls[0].function.arguments), schema)


class TestEmbeddings:
    def test_they_are_the_mean_of_transformers_states(
        self, sdk: openai.OpenAI, sample_cache: Path
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = ensure_sample(EMBED, sample_cache)
        texts = sorted({text for _, first, second in PAIRS for text in (first, second)})
        inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        wanted = torch.nn.functional.normalize(means, dim=1).numpy()
        np.testing.assert_allclose(embed(sdk, texts), wanted, atol=1e-5)

    def test_pairs_are_as_alike_as_a_person_finds_them(self, sdk: openai.OpenAI) -> None:
        degrees = np.array([degree for degree, _, _ in PAIRS])
        left = embed(sdk, [first for _, first, _ in PAIRS])
        right = embed(sdk, [second for _, _, second in PAIRS])
        alike = (left * right).sum(1)
        means = [alike[degrees == degree].mean() for degree in (4, 3, 2, 1)]
        assert sorted(means, reverse=True) == means
        assert alike[degrees == 4].min() > alike[degrees == 1].max()
        assert rank_correlation(list(degrees), list(alike)) > 0.9


class TestSpeech:
    def test_what_is_spoken_is_heard(self, sdk: openai.OpenAI) -> None:
        said = SPOKEN[:5]
        heard = [hear(sdk, speak(sdk, sentence)) for sentence in said]
        assert word_error_rate(said, heard) <= 0.12, heard

    def test_so_it_is_with_the_other_voices(self, sdk: openai.OpenAI) -> None:
        said = SPOKEN[2:5]
        heard = [
            hear(sdk, speak(sdk, sentence, voice), language="en")
            for sentence, voice in zip(said, ("ash", "nova", "shimmer"), strict=True)
        ]
        assert word_error_rate(said, heard) <= 0.12, heard

    def test_two_voices_in_turns_are_two_speakers(self, sdk: openai.OpenAI) -> None:
        said = SPOKEN[2:4] * 2
        wavs = [speak(sdk, text, voice) for text, voice in zip(said, (LOW, HIGH), strict=False)]
        answer: Any = sdk.audio.transcriptions.create(
            model=HEAR,
            file=("a.wav", joined(wavs * 2, pause_s=0.5)),
            response_format="diarized_json",
            language="en",
        )
        assert [each.speaker for each in answer.segments] == ["A", "B", "A", "B"]
        assert word_error_rate(said, [each.text for each in answer.segments]) <= 0.12, answer

    def test_a_voice_with_a_japanese_name_is_listed_as_english(self, server: Server) -> None:
        listed = httpx.get(f"{server.url}/v1/audio/voices", params={"model": SPEAK}).json()
        languages = {voice["id"]: voice["language"] for voice in listed["data"]}
        assert languages["jf_gongitsune"] == languages["alloy"] == "en-us"


class TestConversation:
    """OpenAI's clients talk: a question is answered, a story interrupted, a function called."""

    @pytest.mark.parametrize("program", ["talk_openai.py", "talk_openai_agents.py"])
    def test_python(self, server: Server, program: str) -> None:
        run_pytest(server, program)

    @needs_node
    def test_node(self, server: Server, tmp_path: Path) -> None:
        run_node(server, tmp_path, "talk_openai.mjs")


@pytest.mark.skipif(not clips(), reason="scripts/setup --dev has not fetched the recordings")
class TestTranscription:
    def test_readings_are_heard_word_by_word(self, sdk: openai.OpenAI) -> None:
        texts, errors = [], []
        for clip in clips():
            answer = sdk.audio.transcriptions.create(
                model=HEAR,
                file=("a.wav", clip.wav),
                response_format="verbose_json",
                timestamp_granularities=["word"],
                temperature=0,
            )
            texts.append(answer.text)
            assert answer.words
            heard = ["".join(normal_words(word.word)) for word in answer.words]
            for said, place in matched_words(clip.words, heard):
                errors.append(abs(clip.starts_s[said] - answer.words[place].start))
        assert word_error_rate([clip.text for clip in clips()], texts) <= 0.05, texts
        assert np.median(errors) <= 0.1


def test_only_random_weights_are_said_to_be_random(sdk: openai.OpenAI) -> None:
    header = "x-roundhouse-weights"
    image = sdk.images.with_raw_response.generate(
        model="dall-e-3", prompt="a train", size="128x128"
    )
    assert image.headers[header] == "random"
    chat = sdk.completions.with_raw_response.create(model=CHAT, prompt="a", max_tokens=1)
    assert header not in chat.headers
