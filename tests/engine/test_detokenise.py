"""However a continuation is cut into steps, its text is the same, and it ends at the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from soloist.engine.detokenise import Detokeniser, StopFinder, TextStream
from soloist.scheduling.request import SamplingParams

BYTE_IDS = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, as byte-level BPE falls back to, and one special token."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_IDS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: words with a leading mark, and bytes for what is no word."""
    words = ["▁the", "▁cat", "s", "▁sat"]
    vocab = {word: i for i, word in enumerate(["<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, FALLBACK = byte_tokenizer(), fallback_tokenizer()
END = BYTES.token_to_id("<end>")


def cut(tokens: list[int], points: list[int]) -> list[list[int]]:
    edges = sorted({0, len(tokens), *(p for p in points if p <= len(tokens))})
    return [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]


points = st.lists(st.integers(0, 40))
ids = st.lists(st.sampled_from([*BYTE_IDS.values(), END]), max_size=24)


@given(st.text(max_size=12), points)
def test_characters_of_several_bytes_arrive_whole(text, points):
    detokeniser = Detokeniser(BYTES, ())
    pieces = [detokeniser.push(part) for part in cut(BYTES.encode(text).ids, points)]
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert "".join(pieces) + detokeniser.flush() == text


@given(ids, points)
def test_any_tokens_even_broken_bytes_give_the_text_of_the_whole(tokens, points):
    detokeniser = Detokeniser(BYTES, ())
    pieces = "".join(detokeniser.push(part) for part in cut(tokens, points))
    assert pieces + detokeniser.flush() == BYTES.decode(tokens)


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "▁sat", "é", "€", "🎻"]), min_size=1, max_size=8), points)
def test_byte_fallback_and_leading_spaces(pieces, points):
    """A word mark becomes a space, except before the very first word."""
    tokens = []
    for piece in pieces:
        known = FALLBACK.token_to_id(piece)
        tokens += [FALLBACK.token_to_id(f"<0x{b:02X}>") for b in piece.encode()] if known is None else [known]
    prompt = [FALLBACK.token_to_id("▁the")]
    detokeniser = Detokeniser(FALLBACK, prompt)
    text = "".join(detokeniser.push(part) for part in cut(tokens, points)) + detokeniser.flush()
    assert "the" + text == FALLBACK.decode(prompt + tokens)


def first_complete(text: str, stops: list[str]) -> str:
    """Definition: read character by character; the first stop string to be complete ends the text before it."""
    for end in range(1, len(text) + 1):
        ends = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: min(ends)]
    return text


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), points)
def test_a_stop_string_ends_the_text_wherever_the_steps_are_cut(text, stops, points):
    finder, out, stopped = StopFinder(stops), "", False
    for part in cut(list(text), points):
        piece, stopped = finder.push("".join(part))
        out += piece
        if stopped:
            break
    out += "" if stopped else finder.flush()
    assert out == first_complete(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(st.text("abc", max_size=20), st.text("abc", min_size=1, max_size=4))
def test_no_part_of_a_stop_string_is_ever_shown(text, stop):
    finder, shown = StopFinder([stop]), ""
    for char in text:
        piece, stopped = finder.push(char)
        shown += piece
        assert first_complete(text, [stop]).startswith(shown)
        if stopped:
            break


@pytest.mark.parametrize(("ending", "expected"), [("length", "ab\ufffd"), (None, "ab")])
def test_half_a_character_is_shown_only_at_the_end(ending, expected):
    stream = TextStream(BYTES, (), SamplingParams())
    tokens = BYTES.encode("ab€").ids[:-1]
    assert stream.push(tokens, ending) == (expected, False)


def test_special_tokens_are_text_only_where_asked_for_and_a_missing_tokenizer_gives_none():
    tokens = [*BYTES.encode("hi").ids, END]
    assert TextStream(BYTES, (), SamplingParams()).push(tokens, "length") == ("hi", False)
    shown = SamplingParams(skip_special_tokens=False)
    assert TextStream(BYTES, (), shown).push(tokens, "length") == ("hi" + BYTES.id_to_token(END), False)
    assert TextStream(BYTES, (), shown).push(tokens, "stop") == ("hi", False)
    assert TextStream(None, (), SamplingParams()).push([1, 2], "stop") == ("", False)


@pytest.mark.parametrize(("included", "expected"), [(False, "to b"), (True, "to be")])
def test_what_ends_an_answer_is_shown_where_asked_for(included, expected):
    tokens = BYTES.encode("to be or").ids
    by_text = SamplingParams(stop=("e",), include_stop_str_in_output=included)
    assert TextStream(BYTES, (), by_text).push(tokens, None) == (expected, True)
    by_token = replace(by_text, stop=())
    assert TextStream(BYTES, (), by_token).push(tokens[:5], "stop") == (expected, False)


def test_stop_strings_are_looked_for_behind_the_least_number_of_tokens():
    stream, shown = TextStream(BYTES, (), SamplingParams(stop=("b",), min_tokens=4)), ""
    for token in BYTES.encode("ababab").ids:
        piece, stopped = stream.push([token], None)
        shown += piece
        if stopped:
            break
    assert shown == "ababa"
