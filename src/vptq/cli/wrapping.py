"""Text that arrives in pieces, broken between words at the terminal's edge.

A terminal breaks a line wherever its last column happens to be. A word is shown as it comes, since waiting for its end
would hold every token back by one; where it turns out not to fit it is taken back and begins the next line.
"""

from __future__ import annotations

from rich.cells import cell_len

TAB = 8


class WordWrap:
    """One answer on its way to the terminal, from the first column on."""

    def __init__(self, width: int) -> None:
        """For a terminal of `width` columns.

        The last one stays free: with a character in it terminals disagree on where the cursor is.
        """
        self._width = max(1, width - 1)
        self._column = 0
        self._word = ""  # what of the last word is on this line

    def feed(self, text: str) -> str:
        """What to write for the next piece of the text."""
        return "".join(map(self._place, text))

    def _place(self, character: str) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        cells = TAB - self._column % TAB if character == "\t" else cell_len(character)
        blank = character in " \t"
        written = character
        if self._column + cells > self._width:
            if blank:  # the break is in its place
                self._column, self._word = 0, ""
                return "\n"
            written = self._break() + character
        self._column += cells
        self._word = "" if blank else self._word + character
        return written

    def _break(self) -> str:
        """To the next line, with the word that has been begun unless it fills this one by itself.

        Words of other characters than those one column wide stay: how wide a terminal shows them is its own affair,
        and scripts without spaces are broken anywhere.
        """
        word, self._word = self._word, ""
        if len(word) < self._column and all(cell_len(character) == 1 for character in word):
            self._column, self._word = len(word), word
            return (f"\033[{len(word)}D\033[K" if word else "") + f"\n{word}"
        self._column = 0
        return "\n"
