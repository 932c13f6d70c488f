"""Pieces of text, against the text decoded at once."""

from generation_parts import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from smol.generation.text import TextStream

TOKENS = st.lists(st.integers(0, 60), max_size=40)


def pushed(tokens: list[int], stop: tuple[str, ...]) -> tuple[str, list[str], int]:
    """The text, what was certain of it after each token, and how many tokens were read."""
    stream, certain = TextStream(ByteTokenizer(), stop), []
    for token in tokens:
        stopped = stream.push(token)
        certain.append(stream.text)
        if stopped:
            return stream.text, certain, len(certain)
    stream.finish()
    return stream.text, certain, len(tokens)


@given(TOKENS)
def test_the_pieces_make_up_the_text(tokens):
    text, certain, _ = pushed(tokens, ())
    assert text == ByteTokenizer().decode(tokens)
    for piece in certain:
        assert text.startswith(piece)
        assert not piece.endswith("\ufffd") or "\ufffd" in text


@given(
    st.lists(st.sampled_from([0, 1, 1, 2]), max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_a_text_ends_before_its_first_stop_string(tokens, stop):
    whole = ByteTokenizer().decode(tokens)
    text, certain, read = pushed(tokens, tuple(stop))
    # Token by token, the first moment at which one of the strings is there decides.
    until = next((n for n in range(1, len(whole) + 1) if any(s in whole[:n] for s in stop)), None)
    if until is None:
        assert text == whole
    else:
        assert text == whole[: min(whole[:until].find(s) for s in stop if s in whole[:until])]
        assert read == until
    for piece in certain:
        assert text.startswith(piece)  # nothing was shown that had to be taken back
