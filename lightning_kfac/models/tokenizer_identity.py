"""Is it the tokenizer that it should be? Compared with its own file, and as a fingerprint.

transformers 5 builds class and pre-tokenizer of some tokenizers anew and leaves what ``tokenizer.json`` says of them:
"2023" is then other tokens than in training, and every number measured with them is of another text (its issues 45920
and 45812).
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tokenizers
import transformers
from huggingface_hub import try_to_load_from_cache

from lightning_kfac.console import say
from lightning_kfac.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
# What tokenizers are known to cut in different ways.
PROBES = (
    "The quick brown fox jumps.",
    "2023",
    " in 1984 and 20230415: 1,234,567.89",
    "31415926535897932384626433832795",
    "a  b   c    d        e",
    " before and after  ",
    "\tone\n\ttwo\n\n\nthree\r\nfour \n",
    "It's we'll they've I'd DON'T o'clock",
    "def f(x): return x[0] != {'a': -1}  # TODO",
    "for (int i=0; i<n; ++i) { s += a[i]; }",
    "https://example.org/a_b?c=d&e=%20",
    "snake_case camelCase UPPER",
    "«Où est l\u2019été?» naïve Straße Ångström",
    "e\u0301 é ﬁ ½ Ⅳ \u00a0\u200b\u3000.",
    "你好\uff0c世界。こんにちは 안녕하세요",
    "Привет, мир! שלום مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧🇩🇪",
    "wait... what?! -- (yes) [no] “quoted”",
)


class Difference(NamedTuple):
    """A text that a tokenizer and its file cut in different ways."""

    text: str
    built: list[int]
    filed: list[int]


def own_or_same(
    tokenizer: "PreTrainedTokenizerBase", name: str, own: bool | None, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer that transformers has built, if it does what its own file says, or the file's.

    Args:
        tokenizer: From ``AutoTokenizer``.
        name: Hub name or folder that it was loaded from.
        own: Where they differ: True gives the file's own, False the one that was built; None is an error.
        revision: Of the hub name.

    Returns:
        One of the two; ``tokenizer`` where there is no ``tokenizer.json`` to compare with.

    Raises:
        InputError: They differ, or the file is damaged.
    """
    file = None if own is False else tokenizer_file(name, revision)
    difference = None if file is None else first_difference(tokenizer, file)
    if difference is None:
        return tokenizer
    what = (
        f"tokenizer {name}: transformers {transformers.__version__} ({type(tokenizer).__name__}) makes other ids than "
        f"its {FILE}: {difference.text!r} is {difference.built}, by the file {difference.filed}"
    )
    if own is None:
        raise InputError(
            f"{what}; set data.own_tokenizer to true to use the file's own tokenizer, or to false to use the other",
            "data.own_tokenizer",
        )
    say(f"{what}; the file's own tokenizer is used")
    return transformers.PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")


def tokenizer_file(name: str, revision: str | None = None) -> Path | None:
    """``tokenizer.json`` of a folder, or of a hub name that was loaded before; None where there is none."""
    if Path(name).is_dir():
        file = Path(name) / FILE
        return file if file.is_file() else None
    found = try_to_load_from_cache(name, FILE, revision=revision)
    return Path(found) if isinstance(found, str) else None


def first_difference(tokenizer: "PreTrainedTokenizerBase", file: Path) -> Difference | None:
    """The first probe of which a tokenizer makes other ids than its file, without special tokens or with them."""
    try:
        filed = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more special
        raise InputError(f"{file}: damaged or incomplete: {first_line(error)}") from None
    filed.no_padding()
    filed.no_truncation()
    for special in (False, True):
        texts = list(PROBES[:1] if special else PROBES)
        ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
        for text, built, encoding in zip(
            texts, ids, filed.encode_batch(texts, add_special_tokens=special), strict=True
        ):
            if list(built) != encoding.ids:
                return Difference(text, list(built), encoding.ids)
    return None


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what a tokenizer does: vocabulary, merges, rules, added tokens and end-of-text token.

    Where it lies, and how it pads or cuts rows at the moment, changes nothing. Of a tokenizer without a backend of the
    tokenizers package: of its vocabulary and of what it makes of some probes.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr((sorted(tokenizer.get_vocab().items()), [tokenizer(probe)["input_ids"] for probe in PROBES]))
    else:
        text = _without_state(backend)
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}".encode()).hexdigest()


def _without_state(backend: tokenizers.Tokenizer) -> str:
    """A backend as text, without the padding and truncation that are set at the moment."""
    padding = backend.padding
    truncation = backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return str(backend.to_str())
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
