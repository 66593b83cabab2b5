from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dmoe.data.tokenizer import ByteTokenizer, HFTokenizer
from dmoe.generation.text import TextStream

BYTES = ByteTokenizer()


def stream(tokenizer, prompt: str, ids, stop=()) -> tuple[TextStream, list[str]]:
    """Push tokens until the end or a stop string; return the stream and the pieces it released."""
    text = TextStream(tokenizer, tokenizer.encode(prompt).tolist(), stop)
    pieces = []
    for token in ids:
        text.push(int(token))
        if text.stopped:
            break
        pieces.append(text.take(final=False))
    text.finish()
    pieces.append(text.take(final=True))
    return text, pieces


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_join_to_the_text_cut_at_the_first_stop_string(text, stop):
    cut, pieces = stream(BYTES, "prompt", BYTES.encode(text), stop)
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    assert cut.text == (text[: ends[0][1]] if ends else text)
    assert cut.stopped == bool(ends)
    assert "".join(pieces) == cut.text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_give_what_the_tokenizer_decodes(ids):
    text, pieces = stream(BYTES, "p", ids)
    assert text.text == "".join(pieces) == BYTES.decode(ids)


def test_a_character_is_released_whole():
    text = "aé€😀b"
    ids = BYTES.encode(text)
    _, pieces = stream(BYTES, "x", ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_a_character_that_never_ends_is_replaced_at_the_end():
    text, pieces = stream(BYTES, "x", "a€".encode()[:-1])
    assert text.text == "a�"
    assert pieces == ["a", "", "", "�"]


def test_the_start_of_a_stop_string_is_held_back():
    _, pieces = stream(BYTES, "x", b"a\n\nUx\n\nUser: no", ["\n\nUser:"])
    assert pieces[:5] == ["a", "", "", "", "\n\nUx"]
    assert "".join(pieces) == "a\n\nUx"


def test_a_stop_string_does_not_count_in_the_prompt():
    text, _ = stream(BYTES, "EN", b"D END.", ["END"])
    assert text.text == "D "


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def bpe(request, tmp_path_factory) -> HFTokenizer:
    """A small BPE; the metaspace kind drops the space that opens what it decodes."""
    name = {"byte_level": "ByteLevel", "metaspace": "Metaspace"}[request.param]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = getattr(tokenizers.pre_tokenizers, name)()
    tokenizer.decoder = getattr(tokenizers.decoders, name)()
    alphabet = (
        tokenizers.pre_tokenizers.ByteLevel.alphabet() if request.param == "byte_level" else []
    )
    tokenizer.train_from_iterator(
        ["the cat and the hat, the end of the cat", "é€😀"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    tokenizer.save(str(path))
    return HFTokenizer(path)


def test_a_tokenizer_json_streams_what_it_decodes_after_the_prompt(bpe):
    prompt, text = "the cat", " and the hat é€ the end"
    both = bpe.encode(prompt + text)
    opening = bpe.encode(prompt)
    assert both[: len(opening)].tolist() == opening.tolist()
    cut, pieces = stream(bpe, prompt, both[len(opening) :])
    assert cut.text == "".join(pieces) == text
    assert not any(a.endswith("�") for a, _ in pairwise(pieces))


def test_a_stop_string_is_found_across_tokens(bpe):
    ids = bpe.encode("the cat and the hat")[1:]
    cut, _ = stream(bpe, "the", ids, ["t an"])
    assert cut.stopped
    assert cut.text == " ca"
