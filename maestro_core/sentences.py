"""Parallel sentences from a folder, as tokens of one vocabulary that both languages share.

Files are SPLIT.LANGUAGE or SPLIT.LANGUAGE.gz, one sentence a line; line i of both languages is one
pair. Validation sentences choose; test sentences only score.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maestro_core.data import CPU, DataError, Inputs, Pictures, evenly
from maestro_core.loss import IGNORED

PAD, UNKNOWN, BEGIN, END = range(4)
TOKENS = 28  # of both sentences of the pair whose cost is measured (Maestro, ICML 2024, Table 3)
STRETCH = 50  # batches whose sentences are sorted by length together


@dataclass(frozen=True, slots=True, eq=False)
class Sentences:
    """Pairs of sentences: source (n, s) to END, target (n, t) from BEGIN to END; then PAD.

    Batches are put on `device`.
    """

    source: Tensor
    target: Tensor
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int) -> Self:
        """Return the first `count` pairs, or all where there are fewer."""
        return replace(self, source=self.source[:count], target=self.target[:count])

    def batch(self, indices: Tensor | slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the network's inputs, source (b, s) and target (b, t), and labels (b, t) for them.

        The label of a token is the one that follows it, IGNORED where none does.
        """
        source, target = (
            _trimmed(side[indices]).to(self.device) for side in (self.source, self.target)
        )
        labels = target[:, 1:]
        return (source, target[:, :-1]), labels.masked_fill(labels == PAD, IGNORED)

    def batches(self, size: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Yield what `batch` returns for all pairs in order, divided `evenly`."""
        yield from map(self.batch, evenly(len(self), size))

    def augmented(
        self, batches: Sequence[Tensor], distortion: float = 0.0
    ) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Yield what `batch` returns for each of `batches`: nothing is changed in training.

        Raises:
            ValueError: a distortion is wanted, which is for pictures.
        """
        if distortion:
            raise ValueError(f"distortion is {distortion}, but sentences can't be distorted")
        return map(self.batch, batches)

    def grouped(self, order: Tensor, size: int) -> list[Tensor]:
        """Split `order`, (n,), into batches of sentences of about one length, in random order.

        Less of a batch is padding so. Sentences are sorted within stretches of 50 batches.
        """
        lengths = (self.source != PAD).sum(1) + (self.target != PAD).sum(1)
        split = [
            batch
            for part in torch.split(order, STRETCH * size)
            for batch in torch.split(part[lengths[part].argsort(stable=True)], size)
        ]
        return [split[i] for i in torch.randperm(len(split)).tolist()]


Samples = Pictures | Sentences


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The three splits, the tokeniser (a SentencePiece model), and the folder they came from.

    `sha256` is of the text of all files and of the tokeniser.
    """

    train: Sentences
    validation: Sentences
    test: Sentences
    tokenizer: bytes
    name: str
    sha256: str

    def on(self, device: torch.device) -> Self:
        """Return the same text, whose batches are put on `device`."""
        train, validation, test = (
            replace(part, device=device) for part in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def load(
    path: Path, languages: tuple[str, str], splits: tuple[str, str, str], vocabulary: int
) -> Corpus:
    """Read the folder `path`; `languages` are source and target, `splits` train, validation, test.

    The tokeniser has `vocabulary` tokens and is made of both languages' training sentences.

    Raises:
        DataError: a file is missing, damaged or not UTF-8, a sentence is empty, a pair lacks one
            side, or so many tokens can't be made.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    digest = hashlib.sha256()
    texts = [_pair(path, split, languages, digest.update) for split in splits]
    tokenizer = train_tokenizer([*texts[0][0], *texts[0][1]], vocabulary, path)
    digest.update(tokenizer)
    processor = SentencePieceProcessor(model_proto=tokenizer)
    train, validation, test = (
        Sentences(
            source=_table([[*tokens, END] for tokens in processor.encode(source)]),
            target=_table([[BEGIN, *tokens, END] for tokens in processor.encode(target)]),
        )
        for source, target in texts
    )
    return Corpus(train, validation, test, tokenizer, path.name, digest.hexdigest())


def train_tokenizer(sentences: Sequence[str], vocabulary: int, path: Path) -> bytes:
    """Return a SentencePiece model of `vocabulary` tokens, by byte-pair encoding.

    The same sentences give the same bytes. `path` is for the message of an error.

    Raises:
        DataError: the sentences are too few for so many tokens, or need more.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            character_coverage=1.0,
            num_threads=1,
            shuffle_input_sentence=False,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise DataError(f"{path}: no tokeniser of {vocabulary} tokens: {reason}") from None
    return model.getvalue()


def example(samples: Samples) -> Inputs:
    """Return the one sample that a cost is measured on: the first, or a pair of 28 tokens each."""
    if isinstance(samples, Sentences):
        tokens = torch.full((1, TOKENS), UNKNOWN, device=samples.device)
        return tokens, tokens
    return samples.batch(slice(0, 1))[0]


def _pair(
    path: Path, split: str, languages: tuple[str, str], digest: Callable[[bytes], None]
) -> tuple[list[str], list[str]]:
    """Return the sentences of one split in both languages; their bytes go to `digest`."""
    files = [_file(path / f"{split}.{language}") for language in languages]
    contents = [_read(file) for file in files]
    for content in contents:
        digest(content)
    source, target = (_lines(file, text) for file, text in zip(files, contents, strict=True))
    if len(source) != len(target):
        raise DataError(
            f"{files[0]} has {len(source)} lines, {files[1].name} {len(target)}: "
            f"line i of both must be one pair"
        )
    return source, target


def _file(plain: Path) -> Path:
    zipped = plain.with_name(f"{plain.name}.gz")
    for path in (plain, zipped):
        if path.is_file():
            return path
    raise DataError(f"{plain}: no such file, nor {zipped.name}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {error}") from error


def _lines(path: Path, content: bytes) -> list[str]:
    """Return the sentences of a file, stripped.

    Raises:
        DataError: there are none, or one is empty or not UTF-8; the message names the line.
    """
    sentences = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            sentence = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: line {number} is not UTF-8: {error.reason}") from None
        if not sentence:
            raise DataError(f"{path}: line {number} is empty")
        sentences.append(sentence)
    return sentences


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=PAD)


def _trimmed(tokens: Tensor) -> Tensor:
    """Return tokens (b, t) without the columns at the end that are padding in all rows."""
    return tokens[:, : int((tokens != PAD).sum(1).max())]
