"""Text to token ids, decided in one place for memorized sets, questions, notebook functions, corpus and held-out text.

A text is read as the model's tokenizer begins it (with its start token, if it has one) and never with a trailing
end-of-text token. A prefix and its suffix are tokenized together and cut where the prefix alone ends: by itself a
suffix would be tokenized as the beginning of a text, with a word-start mark that no model writes within a line.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# A tokenizer of the transformers package as it is called: text in, ``input_ids`` out.
Tokenize = Callable[..., Mapping[str, Any]]
# What may stand before a suffix that is tokenized as a continuation; one of them ends a token with most tokenizers.
ANCHORS = ("\n", "a", ".", "0")


class Continuation(NamedTuple):
    """A prefix and the suffix that follows it, as token ids.

    Attributes:
        straddles: One token of the whole text has parts of both, so that the two were tokenized apart.
    """

    prefix: list[int]
    suffix: list[int]
    straddles: bool


def text_ids(tokenizer: Tokenize, text: str) -> list[int]:
    """A text from its beginning: with the tokenizer's own start token, without what it would put behind.

    Example:
        >>> from lightning_kfac.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("demo")
        >>> tokenizer.decode(text_ids(tokenizer, "Return the value."))
        'Return the value.'
    """
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids = list(encoded["input_ids"])
    added = list(encoded["special_tokens_mask"])
    while ids and added[-1]:
        ids.pop()
        added.pop()
    return ids


def start_tokens(tokenizer: Tokenize) -> list[int]:
    """What the tokenizer puts before a text: its start token, or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    tokens = []
    for token, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if not added:
            break
        tokens.append(token)
    return tokens


def continuation_ids(tokenizer: Tokenize, prefix: str, suffix: str) -> Continuation:
    """A prefix and the suffix that follows it, tokenized together.

    Where a token straddles the end of the prefix, the suffix is tokenized by itself, but as a continuation: without a
    word-start mark.

    Example:
        >>> from lightning_kfac.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("demo")
        >>> found = continuation_ids(tokenizer, "Return the", " value.")
        >>> tokenizer.decode(found.suffix), found.straddles
        (' value.', False)
    """
    before = text_ids(tokenizer, prefix)
    whole = text_ids(tokenizer, prefix + suffix)
    if len(whole) > len(before) and whole[: len(before)] == before:
        return Continuation(before, whole[len(before) :], False)
    return Continuation(before, continued_ids(tokenizer, suffix), True)


def continued_ids(tokenizer: Tokenize, text: str) -> list[int]:
    """A text in the middle of a line: behind an anchor whose own tokens are left out again.

    Example:
        >>> from lightning_kfac.loading import load_tokenizer
        >>> tokenizer = load_tokenizer("demo")
        >>> tokenizer.decode(continued_ids(tokenizer, " value."))
        ' value.'
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for anchor in ANCHORS:
        alone = ids(anchor)
        both = ids(anchor + text)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return ids(text)
