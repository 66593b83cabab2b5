"""Turns the tokens of one continuation into text as they come. Called by `decoding`."""

from collections.abc import Sequence

from dmoe.data import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes to that are not (yet) a whole character."""


class TextStream:
    """The text of one continuation, cut at the first stop string.

    A few tokens before each new one are decoded with it, since a token's text may depend on its
    neighbours: bytes that make up one character, a space that is dropped at the start of a text.

    Args:
        tokenizer: of the model.
        prompt_ids: the tokens that are continued.
        stop: strings of which the first to be complete ends the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self.text = ""
        """The whole characters so far, without the stop string."""
        self.stopped = False
        """Whether a stop string was found."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(prompt_ids)
        # _ids[_start:_end] are tokens whose text is out; they are decoded again with what follows.
        self._start, self._end = 0, len(prompt_ids)
        self._taken = 0

    def push(self, token: int) -> None:
        """Add one token."""
        self._ids.append(token)
        piece = self._undecoded()
        if not piece.endswith(_BROKEN):
            self._add(piece)

    def finish(self) -> None:
        """Add what never became a whole character, after the last token."""
        if not self.stopped:
            self._add(self._undecoded())

    def take(self, *, final: bool) -> str:
        """Return the text that was not returned before and that nothing can take back.

        Args:
            final: no token follows; until then, what may be the start of a stop string stays.
        """
        end = len(self.text)
        if not final:
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        piece, self._taken = self.text[self._taken : end], end
        return piece

    def _undecoded(self) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        return self._tokenizer.decode(self._ids[self._start :])[len(known) :]

    def _add(self, piece: str) -> None:
        if piece:
            self._start, self._end = self._end, len(self._ids)
        # A stop string may begin in the text before, but was not complete in it.
        longest = max(map(len, self._stop), default=1)
        begin = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self.text.find(stop, begin)) >= 0
        ]
        if found:
            _, start = min(found)
            self.text, self.stopped = self.text[:start], True


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper start of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
