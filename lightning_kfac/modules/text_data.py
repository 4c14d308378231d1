"""The LightningDataModule: corpus, held-out text and memorized sets."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_kfac.console import say
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.cutting import PREFIX, SUFFIX
from lightning_kfac.data.loaders import Position, RowLoader, TokenRows, question_loader, row_loader, sequence_loader
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.names import CLEAN, CORPUS, HELDOUT, MEMBERS, MEMORIZED, NONMEMBERS, check_names
from lightning_kfac.data.questions import Question, QuestionSet
from lightning_kfac.data.set_formats import MemorizedSet, TextSet
from lightning_kfac.data.sets import Sets, content_of
from lightning_kfac.data.texts import Texts, with_planted
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.metrics.described import Measures
from lightning_kfac.metrics.functional import Decoding
from lightning_kfac.mining.loaders import Search, begin_search
from lightning_kfac.mining.log import MiningLog
from lightning_kfac.mining.scores import WINDOWS, about_windows, read_windows
from lightning_kfac.mining.windows import Mining, MiningPieces, Piece, spread_windows
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import end_of_text_ids, load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.storage.files import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Typed, so that the command line takes a text with braces in it as a text.
Fields = dict[str, bool | int | str | list[str] | None]


class ReadsTokens(Protocol):
    """What the texts ask of the LightningModule that reads them."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""

    @property
    def max_positions(self) -> int | None:
        """Longest row that it takes, if it has a limit."""

    @property
    def loaded(self) -> "PreTrainedModel":
        """Its model."""

    @property
    def measures(self) -> Measures:
        """What is measured of it."""


class TextData(LightningDataModule):
    """Text to collect curvature on, text to measure perplexity on, sequences to measure recitation on.

    Args:
        corpus: ``embedded``, a file or folder (text, JSON, Parquet, Arrow, token ids), a hub data set name, or a
            mapping with the fields of ``Corpus``. Documents are joined with the EOS token and packed.
        max_tokens: Token budget of the corpus, spread over its documents; null takes all of it.
        seq_len: Tokens a row.
        batch_size: Rows a batch, on each rank.
        heldout: Text for perplexity and nDCG, like ``corpus``; null measures neither. ``embedded`` means
            the documents that are held out of the embedded corpus.
        heldout_tokens: Token budget of the held-out text.
        memorized: Memorized sequences: a file (JSONL, JSON, Parquet, .npy; ``demo:FILE`` names an embedded one), texts
            (rows with ``text``, the lines of a file of text, a folder of files), which are cut into passages, or a
            mapping with the fields of ``MemorizedSet``.
        sets: Further memorized sets, name to what ``memorized`` takes; their metrics carry the name as a prefix.
            Suffixes may differ in length.
        clean_windows: So many windows of the held-out text are a set of their own, ``clean``: what does the edit do
            to text that the model does not recite?
        prefix_len: Tokens of each prefix, its last ones; by default all, and 64 in mining.
        suffix_len: Tokens of each suffix, its first ones; by default all, and 48 in mining.
        members: Texts that the model was trained on, for membership tests: a memorized set, or whole texts (rows with
            ``text``, the lines of a file of text, a folder of files), or a mapping with the fields of ``TextSet``; or
            the name of a set of this run, such as ``memorized``.
        nonmembers: Texts that it was not trained on, drawn in the same way; ``clean`` are the clean windows.
        questions: Questions with known answers, name to a file (JSONL, JSON, Parquet) or to a mapping with the fields
            of ``QuestionSet``; measured by exact answers.
        domains: Text whose curvature is collected as well, by name, each like ``corpus``.
        domain_tokens: Token budget of each domain; null takes all of it.
        eval_batch_size: Sequences a batch in recitation.
        skip_bad_rows: Leave out rows of any file that cannot be used, and say how many; otherwise they are errors.
        mining: How ``predict`` looks for recited windows.
        tokenizer: Hub name or folder; by default the model's own.
        own_tokenizer: Where transformers builds a tokenizer that makes other ids than its ``tokenizer.json``: true
            takes the file's own, false the one that was built; by default the run stops.
        start_token: Put the tokenizer's start token (BOS) before each document of corpus, domains and held-out text; by
            default where the tokenizer itself puts it before a text.
        planted: Memorized sets whose rows are mixed into the corpus when a model is trained.
        exposures: How often each planted row appears.
        shuffle: Shuffle the rows (training; a collection does not need it).
    """

    def __init__(
        self,
        corpus: str | Fields = "embedded",
        max_tokens: int | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        heldout: str | Fields | None = None,
        heldout_tokens: int = 100_000,
        memorized: str | Fields | None = None,
        sets: dict[str, str | Fields] | None = None,
        members: str | Fields | None = None,
        nonmembers: str | Fields | None = None,
        questions: dict[str, str | Fields] | None = None,
        domains: dict[str, str | Fields] | None = None,
        domain_tokens: int | None = None,
        clean_windows: int = 0,
        prefix_len: int | None = None,
        suffix_len: int | None = None,
        eval_batch_size: int = 64,
        skip_bad_rows: bool = False,
        mining: Mining = Mining(),  # noqa: B008 (frozen)
        tokenizer: str | None = None,
        own_tokenizer: bool | None = None,
        start_token: bool | None = None,
        planted: list[str] | None = None,
        exposures: int = 1,
        shuffle: bool = False,
    ):
        super().__init__()
        self.texts = Texts(
            Corpus.parse(corpus),
            max_tokens,
            {name: Corpus.parse(domain, embedded_split="all") for name, domain in (domains or {}).items()},
            domain_tokens,
            None if heldout is None else Corpus.parse(heldout, embedded_split="heldout"),
            heldout_tokens,
            seq_len,
            skip_bad_rows,
            start_token,
        )
        classes = {MEMBERS: members, NONMEMBERS: nonmembers}
        own_sets = [name for name in (MEMORIZED, *(sets or {}), CLEAN) if name != MEMORIZED or memorized]
        own_sets = own_sets if clean_windows else own_sets[:-1]
        self.sets = Sets(
            {
                name: MemorizedSet.parse(name, value)
                for name, value in ({MEMORIZED: memorized} | (sets or {})).items()
                if value
            },
            {name: QuestionSet.parse(name, value) for name, value in (questions or {}).items()},
            prefix_len,
            suffix_len,
            skip_bad_rows,
            {name: TextSet.parse(name, value) for name, value in classes.items() if value},
            {name: value for name, value in classes.items() if isinstance(value, str) and value in own_sets},
        )
        self.corpus = self.texts.corpus
        self.heldout = self.texts.heldout
        self.domains = self.texts.domains
        self.max_tokens = max_tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.memorized_files = {name: memorized.source for name, memorized in self.sets.files.items()}
        self.question_sets = self.sets.questions
        self.clean_windows = clean_windows
        self.skip_bad_rows = skip_bad_rows
        self.mining = mining
        self.window = (prefix_len or PREFIX, suffix_len or SUFFIX)
        self.tokenizer_name = tokenizer
        self.own_tokenizer = own_tokenizer
        self.planted_files = planted or []
        self.exposures = exposures
        self.shuffle = shuffle
        for name, value, least in (
            ("max_tokens", max_tokens, 2),
            ("domain_tokens", domain_tokens, 2),
            ("seq_len", seq_len, 2),
            ("heldout_tokens", heldout_tokens, 2),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("exposures", exposures, 1),
            ("prefix_len", prefix_len, 1),
            ("suffix_len", suffix_len, 1),
            ("clean_windows", clean_windows, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"data.{name} is {value}; it must be at least {least}")
        self._check_names()
        self.text_in_turn = CORPUS
        self.resume_at: Position | None = None  # for the next training loader
        self._search: Search | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._read_with: ModelSource | None = None

    # -- checks, before anything expensive ---------------------------------------------------------

    def check(self, vocab_size: int, max_positions: int | None) -> None:
        """Reads what is cheap to read and raises ``InputError`` for what cannot work.

        Args:
            vocab_size: Token ids must lie below it.
            max_positions: Longest row that the model takes, if it has a limit.
        """
        if max_positions is not None and self.seq_len > max_positions:
            raise InputError(f"data.seq_len is {self.seq_len}, but the model takes at most {max_positions} positions")
        if max_positions is not None and self.clean_windows and sum(self.window) > max_positions:
            raise InputError(
                f"data.clean_windows: windows of {sum(self.window)} tokens, but the model takes at most "
                f"{max_positions} positions; set data.prefix_len and data.suffix_len"
            )
        for file in self.planted_files:
            load_memorized(file, self.tokenizer, vocab_size)
        self.sets.check(self.tokenizer, vocab_size, max_positions)
        self.texts.check()

    def read_as(self, model: ModelSource | None) -> None:
        """Takes a model's own tokenizer as the model is taken (revision, GGUF file, code), unless another is named."""
        if model is not None and self.tokenizer_name in (None, model.name):
            self.tokenizer_name = model.name
            self._read_with = model

    def _check_names(self) -> None:
        if self.clean_windows and (self.heldout is None or CLEAN in self.memorized_files):
            raise InputError("data.clean_windows needs data.heldout, and no set of the name clean")
        check_names("sets", self.memorized_files)
        check_names("questions", self.question_sets, self.memorized_files)
        check_names("domains", self.domains)

    # -- what others ask -----------------------------------------------------------------------------

    def sequences(self, name: str) -> list[MemorizedSequence]:
        """A memorized set that ``setup`` has read."""
        return self.sets.sequences[name]

    def questions(self, name: str) -> list[Question]:
        """A question set that ``setup`` has read."""
        return self.sets.asked[name]

    def measured(self) -> str:
        """Identifies what a validation measures: sets, questions and held-out text by content, and how they are cut."""
        texts = self.texts
        heldout = None if self.heldout is None else (self.heldout, self.heldout.state(), texts.heldout_tokens)
        cut = (
            self.seq_len,
            self.batch_size,
            self.tokenizer_fingerprint,
            list(self.question_sets.values()),
            self.sets.prefix_len,
            self.sets.suffix_len,
            self.clean_windows,
            self.skip_bad_rows,
            *(self.start_tokens if self.heldout is not None else ()),
            *texts.heldout_is_spread(),
        )
        return hashlib.sha256(repr((self.sets.contents(), heldout, cut)).encode()).hexdigest()[:16]

    def about(self, name: str) -> dict[str, Any]:
        """What metadata of factors says of the corpus or of a domain."""
        start = {"start_tokens": self.start_tokens} if self.start_tokens else {}
        made_by = {"tokenizer": self.tokenizer_name, "tokenizer_fingerprint": self.tokenizer_fingerprint}
        return {**made_by, **self.texts.about(name), **start}

    @cached_property
    def start_tokens(self) -> list[int]:
        """What stands before each document."""
        return self.texts.start(self.tokenizer)

    def rows_identity(self, name: str) -> str:
        """Identifies the rows of a text and their order, for any number of ranks and any batch size."""
        planted = [(file, content_of(MemorizedSet(file))) for file in self.planted_files]
        how = (
            self.seq_len,
            self.skip_bad_rows,
            self.shuffle,
            self.exposures,
            self.tokenizer_fingerprint,
            *self.start_tokens,
        )
        return self.texts.identity(name, planted, how)

    def described(self) -> dict[str, Any]:
        """What a figure depends on beside the model: held-out text and how it is packed, and how sets are cut."""
        return {
            "heldout": self.heldout and self.heldout.label,
            "heldout_tokens": self.texts.n_heldout(),
            "heldout_documents": self.texts.n_heldout_documents(),
            "seq_len": self.seq_len,
            "sets": dict(self.memorized_files),
            **{name: texts.source for name, texts in self.sets.classes.items()},
            "prefix_len": self.sets.prefix_len,
            "suffix_len": self.sets.suffix_len,
        }

    @property
    def heldout_rows(self) -> TokenRows | None:
        """Rows of the held-out text, which know their documents; None where nothing is held out."""
        return None if self.heldout is None else self.texts.rows(HELDOUT)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use."""
        if self._tokenizer is None:
            if self.tokenizer_name is None:
                raise InputError("data.tokenizer is not set, and the model has no folder or hub name to take it from")
            source = self._read_with or self.tokenizer_name
            self._tokenizer = load_tokenizer(source, own_tokenizer=self.own_tokenizer)
        return self._tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """Identifies what the tokenizer does; None where there is no tokenizer."""
        return tokenizer_fingerprint(self.tokenizer) if self._tokenizer or self.tokenizer_name else None

    def about_windows(self, scheme: Decoding) -> dict[str, Any]:
        """What says that two searches are of the same windows, and measure the same of them.

        Args:
            scheme: How tokens are drawn.
        """
        return {
            "text": self.corpus.identity(),
            "max_tokens": self.max_tokens,
            "skip_bad_rows": self.skip_bad_rows,
            "start_tokens": self.start_tokens,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "prefix_len": self.window[0],
            "suffix_len": self.window[1],
            "stride": self.mining.stride,
            **{name: getattr(scheme, name) for name in ("temperature", "top_k", "top_p")},
        }

    @property
    def windows_before(self) -> Path | None:
        """The windows of an earlier search, which this one is compared with."""
        return None if self.mining.before is None else Path(self.mining.before) / WINDOWS

    def check_before(self, scheme: Decoding | None) -> None:
        """Raises ``InputError`` where the earlier search was another one."""
        path = self.windows_before
        if path is None:
            return
        if scheme is None:
            raise InputError(
                "mining.before compares how likely windows are drawn; model.measures.extraction must not be null"
            )
        known = about_windows(path)
        for name, value in self.about_windows(scheme).items():
            if known.get(name) != value:
                raise InputError(
                    f"mining.before: {path} is of another search: its {name} is {known.get(name)}, here it is {value}"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        return str(self.tokenizer.decode(list(ids)))

    @property
    def search(self) -> Search:
        """What ``predict`` searches; raises ``RuntimeError`` before it begins."""
        if self._search is None:
            raise RuntimeError("no search for recited windows has begun: trainer.predict begins one")
        return self._search

    # -- Lightning -----------------------------------------------------------------------------------

    @property
    def _run(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("the data have no Trainer yet: give them to trainer.fit, validate or predict")
        return self.trainer

    @property
    def _reader(self) -> ReadsTokens:
        return self._run.lightning_module  # type: ignore[return-value]  # Lightning knows its base class only

    @override
    def prepare_data(self) -> None:
        """Tokenizes each text once into the run folder (one process a node)."""
        self.read_as(getattr(self._reader, "source", None))
        if self.start_tokens:
            words = " ".join(self.tokenizer.convert_ids_to_tokens(self.start_tokens))
            say(f"each document begins with {words} (BOS), as the tokenizer begins a text (data.start_token)")
        self._read_texts()

    @override
    def setup(self, stage: str) -> None:
        """Maps the tokenized text into memory and reads the sets (every process)."""
        module = self._reader
        self.read_as(getattr(module, "source", None))
        self.sets.load_sequences(self.tokenizer, module.vocab_size)
        self._read_texts()
        if stage != "predict":
            self.sets.load_questions(self.tokenizer, module.vocab_size, module.max_positions)
            if self.clean_windows:
                self.sets.sequences[CLEAN] = spread_windows(self.texts.read[HELDOUT], self.clean_windows, *self.window)
            self.sets.load_classes(self.tokenizer, module.vocab_size, module.max_positions)

    def _read_texts(self) -> None:
        folder = Path(self._run.default_root_dir) / "data"
        stage = self._run.state.fn
        if stage is None:
            raise RuntimeError("texts are read for a run: call trainer.fit, validate or predict")
        self.texts.tokenize(folder, str(stage.value), self.tokenizer, self._reader.vocab_size)

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation loaders: memorized sets, questions, members and non-members, the held-out text."""
        return [
            *self.set_names,
            *self.question_sets,
            *self.sets.classes,
            *([HELDOUT] if self.heldout is not None else []),
        ]

    @property
    def set_names(self) -> list[str]:
        """Names of the sets of prefixes and suffixes."""
        return [*self.memorized_files, *([CLEAN] if self.clean_windows else [])]

    @override
    def train_dataloader(self) -> RowLoader:
        """Packed rows of the text in turn (the corpus, or a domain), for training with the planted rows among them."""
        rows = self.texts.rows(self.text_in_turn)
        vocab_size = self._reader.vocab_size
        for file in self.planted_files:
            rows = with_planted(rows, load_memorized(file, self.tokenizer, vocab_size), self.exposures)
        loader = row_loader(rows, self.batch_size, *self._rank, shuffle_seed=0 if self.shuffle else None)
        if self.resume_at is not None:
            loader.load_state_dict(self.resume_at)  # before Lightning asks for the number of batches
            self.resume_at = None
        return loader

    @override
    def val_dataloader(self) -> list[DataLoader[object]]:
        """One loader for each of ``validation_names``."""
        sets = [self.sets.sequences[name] for name in self.set_names]
        loaders: list[DataLoader[object]] = [
            sequence_loader(sequences, self.eval_batch_size, *self._rank) for sequences in sets
        ]
        loaders += [question_loader(q, self.eval_batch_size, *self._rank) for q in self.sets.asked.values()]
        loaders += [
            sequence_loader(self.sets.scored[name], self.eval_batch_size, *self._rank) for name in self.sets.classes
        ]
        if self.heldout is not None:
            loaders.append(row_loader(self.texts.rows(HELDOUT), self.batch_size, *self._rank))
        return loaders

    @override
    def predict_dataloader(self) -> DataLoader[tuple[int, Piece]]:
        """Pieces of the corpus with the windows to look at, but for those that an earlier, unfinished run has done."""
        pieces = MiningPieces(self.texts.read[CORPUS], sum(self.window), self.mining.stride, self.seq_len)
        if self.windows_before is not None:
            pieces.check_again(read_windows(self.windows_before))
        log = MiningLog(Path(self._run.default_root_dir) / "mining", self._mining_key())
        barrier = self._run.strategy.barrier
        self._search = begin_search(pieces, log, self.batch_size * self.seq_len, *self._rank, wait=barrier)
        return self._search.loader

    def _mining_key(self) -> str:
        model = self._reader.loaded
        mining = self.mining
        identity = (
            weights_fingerprint(model, ()),
            model.config.to_json_string(),
            self.corpus.identity(),
            self.max_tokens,
            self.skip_bad_rows,
            self.tokenizer_fingerprint,
            *self.start_tokens,
            *self.window,
            self.seq_len,
            self.batch_size,
            mining.stride,
            None if mining.exhaustive else mining.likely,
            *((mining.bulk_share, load_factors(mining.factors).content()) if mining.factors else ()),
            next(model.parameters()).dtype,
            self._run.precision,
            sorted(end_of_text_ids(model)),
            self._reader.measures.extraction,
            *(() if self.windows_before is None else (content_hash([self.windows_before]),)),
        )
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    @property
    def _rank(self) -> tuple[int, int]:
        return self._run.global_rank, self._run.world_size


def text_data(trainer: Trainer) -> TextData:
    """The data module of a trainer."""
    return trainer.datamodule  # type: ignore[attr-defined]  # a connector of Lightning's sets it
