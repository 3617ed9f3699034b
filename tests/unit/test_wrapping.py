"""Answers on a terminal are broken between words, however they arrive."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq.cli.wrapping import WordWrap

words = st.text(alphabet="abcdefg.,", min_size=1, max_size=14)
texts = st.lists(words, max_size=40).map(" ".join)


def shown(written: str, width: int) -> list[str]:
    """The lines that a terminal of `width` columns shows for `written`; it breaks lines itself where they overflow."""
    lines, column = [""], 0
    for part in re.findall(r"\033\[\d*[DK]|[\s\S]", written):
        if part == "\n":
            lines.append("")
            column = 0
        elif part.startswith("\033") and part.endswith("D"):
            column -= int(part[2:-1])
        elif part.startswith("\033"):
            lines[-1] = lines[-1][:column]
        else:
            if column == width:
                lines.append("")
                column = 0
            lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
            column += 1
    return lines


@given(texts, st.integers(3, 30), st.integers(1, 9))
def test_words_that_fit_a_line_are_whole_and_all_there(text: str, width: int, step: int) -> None:
    wrap = WordWrap(width)
    lines = shown("".join(wrap.feed(text[at : at + step]) for at in range(0, len(text), step)), width)
    assert all(len(line) < width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    found = {word for line in lines for word in line.split()}
    assert found >= {word for word in text.split() if len(word) < width}


@given(texts, st.integers(3, 30), st.integers(1, 9))
def test_how_the_text_is_cut_into_pieces_changes_nothing(text: str, width: int, step: int) -> None:
    whole, wrap = WordWrap(width).feed(text), WordWrap(width)
    assert "".join(wrap.feed(text[at : at + step]) for at in range(0, len(text), step)) == whole


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 9, ["one two ", "three"]),
        ("one two", 4, ["one", "two"]),  # the space where the break is goes
        ("a\nbcd efg", 6, ["a", "bcd ", "efg"]),
        ("abcdefgh", 4, ["abc", "def", "gh"]),
        ("  x", 80, ["  x"]),
        ("a\tb", 12, ["a\tb"]),
    ],
)
def test_breaks_are_where_a_reader_expects_them(text: str, width: int, lines: list[str]) -> None:
    assert shown(WordWrap(width).feed(text), width) == lines


def test_characters_two_columns_wide_are_counted_so_and_broken_anywhere() -> None:
    assert WordWrap(6).feed("日本語日本") == "日本\n語日\n本"


def test_a_short_text_is_written_as_it_is() -> None:
    assert WordWrap(80).feed("It is Paris.") == "It is Paris."
