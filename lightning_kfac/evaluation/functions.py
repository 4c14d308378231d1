"""The measurements as functions, for a notebook: of a model in memory, with the figures of the command line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kfac.console import say
from lightning_kfac.data.loaders import TokenRows, row_loader
from lightning_kfac.data.packing import document_offsets, tokenize_documents
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.data.text_ids import Tokenize, continuation_ids, continued_ids, start_tokens, text_ids
from lightning_kfac.data.texts import heldout_rows
from lightning_kfac.data.tokenized import TokenizedText
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.instruments import Questions
from lightning_kfac.evaluation.leaks import text_losses, text_scores
from lightning_kfac.evaluation.log import NoLog
from lightning_kfac.evaluation.recitation import Recital, Recitation, recite
from lightning_kfac.evaluation.scoring import next_token_scores
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.separation import FPR, auc, auc_interval, tpr_at_fpr
from lightning_kfac.math.statistics import interval
from lightning_kfac.metrics import NDCG, Memorization
from lightning_kfac.metrics.described import Measures, Setting
from lightning_kfac.metrics.functional import LOOSE_SIMILARITY, Decoding, Leaks, expected_share, reaches
from lightning_kfac.metrics.leaks import SCORES
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.language import language_model, most_positions, vocabulary_size
from lightning_kfac.models.loading import end_of_text_ids
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.tokens import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = Sequence[str | Sequence[int] | np.ndarray | Tensor]


@dataclass(frozen=True)
class MemorizationScore:
    """How much of some suffixes a model recites.

    Example:
        >>> MemorizationScore(0.5, 1.0, 0.1, {}, [[4, 5], [6]], 0).strict_accuracy
        0.5

    Attributes:
        strict_accuracy: Share recited token by token.
        loose_accuracy: Share whose similarity (1 - Levenshtein / length) reaches the threshold.
        avg_levenshtein_norm: Mean of Levenshtein / length, in tokens.
        intervals: 95 % interval of each figure (Wilson's for the rates, a bootstrap for the mean).
        continuations: Token ids of each greedy continuation.
        n_near_ties: Verdicts that hang on logits which are equal within the model's precision.
    """

    strict_accuracy: float
    loose_accuracy: float
    avg_levenshtein_norm: float
    intervals: dict[str, tuple[float, float]]
    continuations: list[list[int]]
    n_near_ties: int


def memorization_score(
    model: nn.Module,
    tokenizer: Tokenize | None,
    prefixes: Texts,
    suffixes: Texts,
    *,
    batch_size: int = 64,
    loose_similarity: float = LOOSE_SIMILARITY,
) -> MemorizationScore:
    """Measures whether a model continues prefixes greedily with their suffixes.

    Args:
        model: A causal language model of transformers, also in a wrapper of peft.
        tokenizer: Needed where texts are given; prefix and suffix are tokenized together, as in a memorized set.
        prefixes, suffixes: As many texts, or lists (or int64 tensors) of token ids; suffixes may differ in length.
        batch_size: Sequences at once.
        loose_similarity: Threshold of the loose accuracy.

    Raises:
        ValueError: Not as many prefixes as suffixes, none at all, an empty one, or ids outside the vocabulary.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo"), load_tokenizer("demo")
        >>> memorization_score(model, tokenizer, ["Return the"], [" answer of life"]).strict_accuracy
        0.0
    """
    if batch_size < 1 or not 0 <= loose_similarity <= 1:
        raise InputError(f"batch_size is {batch_size}, loose_similarity {loose_similarity}: at least 1, and 0 to 1")
    model = language_model(model)
    starts, golds = _pairs(prefixes, suffixes, tokenizer, model)
    end_of_text = end_of_text_ids(model)
    metric = Memorization(end_of_text, loose_similarity)
    with _in_eval(model):
        recitation = Recitation(model, end_of_text)
        recitals: list[Recital] = []
        for i in range(0, len(starts), batch_size):
            part = slice(i, i + batch_size)
            recitals += chain(*recitation.add(starts[part], golds[part]))
        recitals += chain(*recitation.finish())
    continuations = [recital.decoded for recital in recitals]
    metric.update(continuations, golds, near_ties=[recital.near_tie for recital in recitals])
    figures = metric.compute()
    names = {"strict_acc": "strict_accuracy", "loose_acc": "loose_accuracy"}
    return MemorizationScore(
        figures["strict_acc"].item(),
        figures["loose_acc"].item(),
        figures["avg_levenshtein_norm"].item(),
        {names.get(name, name): interval(figure) for name, figure in metric.figures.items()},
        continuations,
        int(figures["n_near_ties"]),
    )


@dataclass(frozen=True)
class ExtractionScore:
    """How likely some suffixes are drawn word for word.

    Example:
        >>> import math, torch
        >>> score = ExtractionScore(torch.tensor([math.log(0.5), -math.inf], dtype=torch.float64))
        >>> score.expected_at(2), score.share(0.1)
        (0.375, 0.5)

    Attributes:
        log_p: float64 [n], natural logarithm of the probability that one sample holds the suffix; -inf where none can.
    """

    log_p: Tensor

    def expected_at(self, n: float) -> float:
        """Expected share of the suffixes that n samples of each extract: mean(1 - (1 - p)^n).

        Raises:
            ValueError: n is below 1.
        """
        return expected_share(self.log_p, n)

    def share(self, p: float) -> float:
        """Share of the suffixes that one sample holds with this probability or more.

        Raises:
            ValueError: p lies outside (0, 1).
        """
        return reaches(self.log_p, p).double().mean().item()


def extraction(
    model: nn.Module,
    tokenizer: Tokenize | None,
    prefixes: Texts,
    suffixes: Texts,
    *,
    temperature: float = 1.0,
    top_k: int | None = 40,
    top_p: float = 1.0,
    batch_size: int = 64,
) -> ExtractionScore:
    """Measures how likely a model's samples continue prefixes with their suffixes, word for word (arXiv 2410.19482).

    Nothing is sampled: one forward gives the probability that ``generate(do_sample=True)`` has with the same settings.

    Args:
        model: A causal language model of transformers, also in a wrapper of peft.
        tokenizer: Needed where texts are given; prefix and suffix are tokenized together, as in a memorized set.
        prefixes, suffixes: As many texts, or lists (or int64 tensors) of token ids; suffixes may differ in length, and
            end with their first end of text.
        temperature: Logits are divided by it.
        top_k: So many of the likeliest tokens can be drawn; None takes all.
        top_p: Of these, the likeliest until their mass reaches it.
        batch_size: Sequences at once.

    Raises:
        ValueError: A setting is out of range; not as many prefixes as suffixes, none at all, an empty one, or ids
            outside the vocabulary.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo"), load_tokenizer("demo")
        >>> score = extraction(model, tokenizer, ["Return the"], [" value"], top_k=None)
        >>> score.expected_at(1) < score.expected_at(1000) <= 1
        True
    """
    decoding = Decoding(temperature, top_k, top_p)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1")
    model = language_model(model)
    starts, golds = _pairs(prefixes, suffixes, tokenizer, model)
    end_of_text = end_of_text_ids(model)
    log_p: list[float | None] = []
    with _in_eval(model):
        for i in range(0, len(starts), batch_size):
            part = slice(i, i + batch_size)
            recitals = recite(model, starts[part], golds[part], end_of_text, decode=False, decoding=decoding)
            log_p += [recital.log_p for recital in recitals]
    return ExtractionScore(torch.tensor(log_p, dtype=torch.float64))


@dataclass(frozen=True)
class MembershipScore:
    """How members and non-members score, and how well each measure tells them apart.

    Example:
        >>> score = MembershipScore([{"loss": 1.0}, {"loss": 3.0}], [{"loss": 2.0}, {"loss": 4.0}])
        >>> score.auc("loss"), score.tpr_at_fpr("loss")
        (0.75, 0.5)

    Attributes:
        members, nonmembers: Scores of each text by measure: ``loss``, ``zlib``, ``reference``, ``min_k``,
            ``min_k_plus_plus``, ``exact_match``, ``extraction_strength``; with factors ``bulk_share`` and its control
            ``bulk_share_random``, and the share of each layer by its name.
    """

    members: list[dict[str, float]]
    nonmembers: list[dict[str, float]]

    @property
    def measures(self) -> list[str]:
        """Names of what was measured."""
        return list(self.members[0])

    def auc(self, measure: str = "loss") -> float:
        """Chance that a member scores above a non-member; 0.5 tells nothing."""
        return auc(*self._classes(measure))

    def interval(self, measure: str = "loss") -> tuple[float, float]:
        """95 % interval of the AUC; NaN where a class has one text."""
        return auc_interval(*self._classes(measure))

    def tpr_at_fpr(self, measure: str = "loss", fpr: float = FPR) -> float:
        """Share of members found at a threshold that at most this share of non-members reaches.

        Raises:
            ValueError: The share lies outside [0, 1).
        """
        return tpr_at_fpr(*self._classes(measure), fpr)

    def _classes(self, measure: str) -> tuple[list[float], list[float]]:
        if measure not in self.measures:
            raise InputError(f"{measure!r} was not measured; choose from {', '.join(self.measures)}")
        sign = SCORES[measure].sign if measure in SCORES else 1
        first, second = ([sign * text[measure] for text in texts] for texts in (self.members, self.nonmembers))
        return first, second


# A text or ids, or a pair of a prefix and the suffix to score.
Scored = Sequence[str | Sequence[int] | np.ndarray | Tensor | tuple[Any, Any]]


def membership(
    model: nn.Module,
    tokenizer: Tokenize | None,
    members: Scored,
    nonmembers: Scored,
    *,
    k: float = 0.2,
    reference: nn.Module | None = None,
    factors: Mapping[str, KroneckerFactors] | None = None,
    batch_size: int = 64,
) -> MembershipScore:
    """Measures whether texts that a model was trained on can be told from others that were drawn in the same way.

    Args:
        model: A causal language model of transformers, also in a wrapper of peft.
        tokenizer: Needed where texts are given, and for the zlib ratio.
        members, nonmembers: Whole texts, or lists (or int64 tensors) of token ids, of which what begins them is
            predicted by nothing; or pairs (prefix, suffix) of these, of which the suffix is scored. What is longer than
            the model takes is cut.
        k: Share of a text's tokens, the least likely, that Min-K and Min-K++ look at.
        reference: A model of the same tokenizer that did not see the members.
        factors: Of layers of the model, whose bulk shares are measured too; see ``math.bulk``.
        batch_size: Texts at once.

    Raises:
        ValueError: A class is empty, a text is empty or too short, the two are of different kinds, or ids lie outside
            the vocabulary.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo"), load_tokenizer("demo")
        >>> score = membership(model, tokenizer, ["Return the value."], ["Ghost umbrella xylophone."])
        >>> score.auc("loss"), score.measures[:3]
        (1.0, ['loss', 'zlib', 'min_k'])
    """
    settings = Leaks(k)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1")
    model = language_model(model)
    classes = {"members": members, "nonmembers": nonmembers}
    kinds = {_is_pair(text) for texts in classes.values() if not isinstance(texts, str) for text in texts}
    if len(kinds) > 1:
        raise InputError("give whole texts or pairs of prefix and suffix, not both: their scores do not compare")
    decode = getattr(tokenizer, "decode", None)
    bulk = None if factors is None else BulkShare(model, factors)
    found = {}
    with _in_eval(model), _in_eval(reference or model):
        for name, texts in classes.items():
            starts, golds = _scored(texts, tokenizer, model, name)
            scores = []
            for i in range(0, len(starts), batch_size):
                part = starts[i : i + batch_size], golds[i : i + batch_size]
                losses = None if reference is None else text_losses(language_model(reference), *part)
                scores += text_scores(model, *part, k=settings.k, decode=decode, reference_losses=losses, bulk=bulk)
            found[name] = scores
    return MembershipScore(**found)


def _is_pair(text: object) -> bool:
    return isinstance(text, tuple) and len(text) == 2 and not isinstance(text[0], int)


def _scored(
    texts: Scored, tokenizer: Tokenize | None, model: nn.Module, name: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prefixes and of what is scored behind them."""
    if isinstance(texts, str) or not len(texts):
        raise InputError(f"{name}: give a list of texts, at least one")
    if _is_pair(texts[0]):
        pairs = cast("Sequence[tuple[Any, Any]]", texts)
        return _pairs([prefix for prefix, _ in pairs], [suffix for _, suffix in pairs], tokenizer, model)
    rows = _ids(cast(Texts, texts), tokenizer, vocabulary_size(model), name)
    begin = 1
    if tokenizer is not None and isinstance(texts[0], str):
        begin = max(1, len(start_tokens(tokenizer)))
    if short := [number for number, row in enumerate(rows) if len(row) <= begin]:
        raise InputError(f"{name} {short[0]}: its only token is predicted by nothing")
    return [row[:begin] for row in rows], [row[begin : _max_positions(model)] for row in rows]


def perplexity(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: Texts,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
) -> float:
    """exp(sum of NLL / number of predicted tokens), as the command line measures it on held-out text.

    Args:
        texts: Documents, packed as the command line packs them: each ends with the EOS token and begins with the
            tokenizer's start token, if it puts one before a text; then it has rows of its own. Or lists of token ids,
            each by itself.
        seq_len: Tokens of the longest row; its first token is predicted by nothing and does not count.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo"), load_tokenizer("demo")
        >>> 1 < perplexity(model, tokenizer, ["Return the value for key if key is in the dictionary."]) < 2048
        True
    """
    model = language_model(model)
    metric = LossPerplexity()
    with _in_eval(model):
        for batch, documents in _batches(model, tokenizer, texts, seq_len, batch_size):
            losses, _ = next_token_scores(model, batch, k=1)
            metric.update(losses.cpu(), batch.valid.cpu(), batch.sample_index, documents)
    return metric.compute().item()


def ndcg(
    model: nn.Module,
    baseline: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: Texts,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
) -> float:
    """nDCG@10 of a model's next-token rankings against those of the unedited model; rows as in ``perplexity``.

    Args:
        baseline: The unedited model; its ten likeliest tokens have relevance 10 to 1.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo"), load_tokenizer("demo")
        >>> ndcg(model, model, tokenizer, ["Return the value for key."])
        1.0
    """
    model = language_model(model)
    baseline = language_model(baseline)
    metric = NDCG()
    with _in_eval(model), _in_eval(baseline):
        if vocabulary_size(model) != vocabulary_size(baseline):
            raise InputError("the two models have vocabularies of different sizes")
        for batch, documents in _batches(model, tokenizer, texts, seq_len, batch_size):
            _, ranking = next_token_scores(model, batch)
            there = batch.to(next(baseline.parameters()).device)
            _, reference = next_token_scores(baseline, there)
            metric.update(ranking.cpu(), reference.cpu(), batch.valid.cpu(), batch.sample_index, documents)
    return metric.compute().item()


def exact_accuracy(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    questions: str | Mapping[str, Any] | QuestionSet,
    *,
    batch_size: int = 64,
) -> float:
    """Share of questions that a model answers right, letter by letter; it writes greedily.

    Args:
        questions: A file, a mapping with the fields of ``QuestionSet``, or one.
        batch_size: Questions at once.

    Example:
        >>> from lightning_kfac.loading import load_model, load_tokenizer
        >>> model, tokenizer = load_model("demo-arithmetic"), load_tokenizer("demo-arithmetic")
        >>> exact_accuracy(model, tokenizer, {"source": "demo-arithmetic:facts_protected.jsonl", "limit": 20}) > 0.5
        True
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: at least 1")
    asked = QuestionSet.parse("questions", questions).load(tokenizer, vocabulary_size(model), _max_positions(model))
    setting = Setting(Measures(), end_of_text_ids(model), compared=False, ranked=False)
    instrument = Questions("questions", setting, NoLog(), "")
    with _in_eval(model):
        for i in range(0, len(asked), batch_size):
            index = range(i, min(i + batch_size, len(asked)))
            instrument.add(model, asked[i : i + batch_size], index, lambda ids: str(tokenizer.decode(list(ids))))
    return float(cast(float, instrument.results()["exact_acc"]))


def _pairs(
    prefixes: Texts, suffixes: Texts, tokenizer: Tokenize | None, model: nn.Module
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prefixes and of the suffixes that follow them, which the model can take."""
    if isinstance(prefixes, str) or isinstance(suffixes, str):
        raise InputError("give lists of prefixes and suffixes, not one text")
    if len(prefixes) != len(suffixes) or not len(prefixes):
        raise InputError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes: give as many of both, at least one")
    vocabulary = vocabulary_size(model)
    together = list(suffixes)
    straddling = 0
    for number, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        if isinstance(suffix, str) and tokenizer is not None:
            if not isinstance(prefix, str):
                together[number] = continued_ids(tokenizer, suffix)
                continue
            _, together[number], straddles = continuation_ids(tokenizer, prefix, suffix)
            straddling += straddles
    if straddling:
        say(
            f"in {straddling:,} of {len(together):,} sequences a token straddles the end of the prefix, so the suffix "
            "was tokenized by itself"
        )
    starts = _ids(prefixes, tokenizer, vocabulary, "prefix")
    golds = _ids(together, tokenizer, vocabulary, "suffix")
    _check_length(model, max(len(p) + len(g) for p, g in zip(starts, golds, strict=True)), "a sequence")
    return starts, golds


def _ids(texts: Texts, tokenizer: Tokenize | None, vocabulary: int, kind: str) -> list[list[int]]:
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise InputError(f"{kind} {number} is a text: give a tokenizer")
            text = text_ids(tokenizer, text)
        ids = [int(token) for token in (text.tolist() if isinstance(text, Tensor | np.ndarray) else text)]
        if not ids:
            raise InputError(f"{kind} {number} is empty")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InputError(f"{kind} {number} has ids outside the model's vocabulary (0 to {vocabulary - 1})")
        rows.append(ids)
    return rows


def _batches(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", texts: Texts, seq_len: int, batch_size: int
) -> Iterator[tuple[TokenBatch, Tensor]]:
    """Batches, and the document of each target: figures are summed as the command line sums them."""
    if seq_len < 2 or batch_size < 1:
        raise InputError(f"seq_len is {seq_len}, batch_size {batch_size}: at least 2 and 1")
    if isinstance(texts, str):
        raise InputError("give a list of texts, not one text")
    rows = _rows(tokenizer, texts, seq_len, vocabulary_size(model)) if len(texts) else None
    longest = 0 if rows is None else int(np.diff(rows.offsets).max())
    if rows is None or longest < 2:
        raise InputError("no text has two tokens, so there is nothing to predict")
    _check_length(model, longest, "a row; lower seq_len:")
    manner_of(model).check_length(model, longest)
    device = next(model.parameters()).device
    for batch in row_loader(rows, batch_size, 0, 1):
        tokens = TokenBatch.from_dict(cast(dict[str, Any], batch))
        yield tokens.to(device), rows.documents_of_targets(tokens.sample_index, tokens.shape[1])


def _rows(tokenizer: "PreTrainedTokenizerBase | None", texts: Texts, seq_len: int, vocabulary: int) -> TokenRows:
    """Documents packed as held-out text, or lists of ids cut each by itself."""
    documents = [text for text in texts if isinstance(text, str)]
    if documents and len(documents) < len(texts):
        raise InputError("give texts or lists of token ids, not both")
    if documents and tokenizer is not None:
        start = start_tokens(tokenizer)
        found = list(tokenize_documents(documents, tokenizer, None, start=start))
        _ids(found, None, vocabulary, "text")
        return heldout_rows(_joined(found), seq_len, start)
    whole = _joined([np.asarray(ids, dtype=np.int32) for ids in _ids(texts, tokenizer, vocabulary, "text")])
    return TokenRows(whole.tokens, document_offsets(whole.ends, seq_len), (), whole.ends)


def _joined(documents: Sequence[np.ndarray]) -> TokenizedText:
    """Arrays of tokens one after the other."""
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    return TokenizedText(np.concatenate([np.empty(0, dtype=np.int32), *documents]), ends)


def _max_positions(model: nn.Module) -> int | None:
    return most_positions(language_model(model).config.get_text_config())


def _check_length(model: nn.Module, length: int, what: str) -> None:
    most = _max_positions(model)
    if most is not None and length > most:
        raise InputError(f"{what} of {length} tokens, but the model takes at most {most} positions")


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Dropout would change every figure."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
