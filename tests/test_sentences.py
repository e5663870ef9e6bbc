"""Parallel text: what is read from the folder, the tokens it becomes, and what is refused."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from maestro_core import sentences
from maestro_core.data import DataError
from maestro_core.loss import IGNORED
from maestro_core.sentences import BEGIN, END, PAD, UNKNOWN, Corpus, Sentences, train_tokenizer
from tests.text import pairs, write_text

VOCABULARY = 90


def read(path: Path) -> Corpus:
    return sentences.load(path, ("de", "en"), ("train", "val", "test"), VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "animals")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return read(folder)


def test_tokens_are_the_sentences_between_marks(corpus: Corpus) -> None:
    processor = SentencePieceProcessor(model_proto=corpus.tokenizer)
    source, target = pairs(60, 1)[7]

    (x, y), labels = corpus.validation.batch(slice(7, 8))

    assert x.tolist() == [[*processor.encode(source), END]]
    assert y.tolist() == [[BEGIN, *processor.encode(target)]]
    assert labels.tolist() == [[*processor.encode(target), END]]
    assert processor.decode(labels[0, :-1].tolist()) == target
    assert processor.vocab_size() == VOCABULARY
    assert [processor.id_to_piece(i) for i in (PAD, UNKNOWN, BEGIN, END)] == [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
    ]


def test_a_batch_is_as_long_as_its_longest_and_padding_has_no_label(corpus: Corpus) -> None:
    indices = torch.tensor([0, 5, 9])
    alone = [corpus.train.batch(indices[i : i + 1]) for i in range(3)]

    (x, y), labels = corpus.train.batch(indices)

    assert x.shape[1] == max(a[0][0].shape[1] for a in alone)
    assert y.shape == labels.shape
    for row, ((source, _), label) in enumerate(alone):
        assert torch.equal(x[row, : source.shape[1]], source[0])
        assert (x[row, source.shape[1] :] == PAD).all()
        assert torch.equal(labels[row, : label.shape[1]], label[0])
        assert (labels[row, label.shape[1] :] == IGNORED).all()


def test_the_splits_are_those_of_the_files(corpus: Corpus) -> None:
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (160, 60, 80)
    assert len(corpus.train.first(7)) == 7
    assert corpus.name == "animals"


def test_batches_take_every_sentence_once_and_waste_little(corpus: Corpus) -> None:
    torch.manual_seed(0)
    order = torch.randperm(160)

    batches = corpus.train.grouped(order, 24)

    assert sorted(torch.cat(batches).tolist()) == list(range(160))
    assert sorted(map(len, batches)) == [16, *[24] * 6]

    def padding(split: list[torch.Tensor]) -> int:
        return sum(int((corpus.train.batch(b)[1] == IGNORED).sum()) for b in split)

    assert padding(batches) < 0.3 * padding(list(torch.split(order, 24)))


def test_the_same_sentences_give_the_same_tokeniser(corpus: Corpus, folder: Path) -> None:
    again = read(folder)

    assert again.tokenizer == corpus.tokenizer
    assert again.sha256 == corpus.sha256
    assert torch.equal(again.train.source, corpus.train.source)


def test_other_sentences_have_another_digest(corpus: Corpus, tmp_path: Path) -> None:
    other = write_text(tmp_path / "animals")
    file = other / "test.en"
    file.write_text(file.read_text().replace("horse", "mouse"))

    assert read(other).sha256 != corpus.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "val.en").unlink(), r"val\.en: no such file, nor val\.en\.gz"),
        (
            lambda at: (at / "val.en").write_text("a dog.\n"),
            r"val\.de has 60 lines, val\.en 1: line i of both must be one pair",
        ),
        (lambda at: (at / "test.de").write_bytes(b"ein\n \nhund\n"), r"test\.de: line 2 is empty"),
        (lambda at: (at / "test.de").write_bytes(b""), r"test\.de: line 1 is empty"),
        (
            lambda at: (at / "test.en").write_bytes(b"a dog\na caf\xe9 \n"),
            r"test\.en: line 2 is not UTF-8",
        ),
        (lambda at: (at / "train.de.gz").write_bytes(b"no"), r"train\.de\.gz: can't be read"),
        (
            lambda at: (at / "train.de.gz").write_bytes(gzip.compress(b"ein hund\n" * 99)[:-9]),
            r"train\.de\.gz: can't be read",
        ),
    ],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(write_text(tmp_path / "animals"))

    with pytest.raises(DataError, match=message):
        read(tmp_path / "animals")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such folder"):
        read(tmp_path / "none")


@pytest.mark.parametrize("vocabulary", [5, 5_000])
def test_a_vocabulary_that_can_not_be_made_is_refused(vocabulary: int) -> None:
    text = [sentence for pair in pairs(30, 0) for sentence in pair]

    with pytest.raises(DataError, match=f"here: no tokeniser of {vocabulary} tokens: Vocab"):
        train_tokenizer(text, vocabulary, Path("here"))


def test_lines_end_as_on_any_system_and_odd_separators_are_no_ends(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "animals")
    for language in ("de", "en"):
        (folder / f"val.{language}").write_bytes("ein\u2028hund\r\neine\x0bkatze".encode())

    assert len(read(folder).validation) == 2


def test_a_file_without_sentences_of_one_length_has_an_own_width() -> None:
    table = Sentences(torch.tensor([[5, END, PAD]]), torch.tensor([[BEGIN, 6, END]]))

    (source, target), labels = table.batch(slice(None))

    assert source.tolist() == [[5, END]]
    assert target.tolist() == [[BEGIN, 6]]
    assert labels.tolist() == [[6, END]]
