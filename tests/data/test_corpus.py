import os
from itertools import pairwise

import numpy as np
import pytest

from moestro.data import Batches, ByteTokenizer, Document, prepare_corpus, train_bpe
from moestro.data.corpus import _Entry, split_documents


def texts(file, tokenizer):
    """The documents of a token file, as text."""
    return [tokenizer.decode(file.tokens[a:b]) for a, b in pairwise(file.offsets)]


@pytest.fixture
def folders(tmp_path):
    for name, count in (("law", 30), ("poems", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} number {i}, naïve 🙂\n" * 5)
    return [str(tmp_path / "law"), str(tmp_path / "poems")]


@pytest.mark.parametrize("kind", ["byte", "bpe:300"])
def test_every_document_is_in_one_split_whole(folders, tmp_path, kind):
    corpus = prepare_corpus(folders, kind, tmp_path / "cache")
    train = texts(corpus.train, corpus.tokenizer)
    validation = texts(corpus.validation, corpus.tokenizer)
    written = [path.read_text() for folder in folders for path in (tmp_path / folder).iterdir()]
    assert sorted(train + validation) == sorted(written)
    assert not set(train) & set(validation)
    assert corpus.domains == ["law", "poems"]
    counts = {(row["split"], row["domain"]): row["documents"] for row in corpus.counts}
    assert counts == {
        ("train", "law"): 27,
        ("train", "poems"): 1,
        ("validation", "law"): 3,
        ("validation", "poems"): 1,
    }
    for file in (corpus.train, corpus.validation):
        assert file.num_bytes == file.piece_bytes[file.tokens].sum()
        for text, start in zip(texts(file, corpus.tokenizer), file.offsets[:-1], strict=True):
            assert corpus.domains[file.domains[start]] == text.split()[0]
    assert corpus.train.num_bytes + corpus.validation.num_bytes == sum(len(text.encode()) for text in written)


def test_bits_per_byte_counts_every_byte_once(folders, tmp_path):
    corpus = prepare_corpus(folders, "bpe:300", tmp_path / "cache")
    first = corpus.validation.piece_bytes[corpus.validation.tokens[0]]  # the one token that is no target
    batches = Batches(corpus.validation, 2, 16, shuffle=False)
    assert sum(batch.num_bytes for batch in batches) == corpus.validation.num_bytes - first


def test_the_same_contents_are_prepared_once(folders, tmp_path):
    first = prepare_corpus(folders, "byte", tmp_path / "cache")
    before = os.stat(first.train.path).st_mtime_ns
    again = prepare_corpus(folders, ByteTokenizer(), tmp_path / "cache")
    assert os.stat(again.train.path).st_mtime_ns == before
    assert again.fingerprint == first.fingerprint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.fingerprint]


def test_two_caches_hold_the_same_bytes(folders, tmp_path):
    a, b = (prepare_corpus(folders, "bpe:300", tmp_path / name) for name in ("a", "b"))
    for one, other in ((a.train, b.train), (a.validation, b.validation)):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_contents_tokenizer_and_split_are_part_of_the_fingerprint(folders, tmp_path):
    def fingerprint(tokenizer="byte", **split):
        return prepare_corpus(folders, tokenizer, tmp_path / "cache", **split).fingerprint

    seen = [fingerprint(), fingerprint("bpe:300"), fingerprint(train_bpe(["a"], 300))]
    seen += [fingerprint(seed=1), fingerprint(validation_fraction=0.2)]
    law = tmp_path / "law" / "0.txt"
    law.write_text(law.read_text().replace("number", "nombre"))  # as long as before
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_split_follows_the_seed(folders, tmp_path):
    def validation(seed):
        corpus = prepare_corpus(folders, "byte", tmp_path / "cache", seed=seed)
        return set(texts(corpus.validation, corpus.tokenizer))

    assert validation(1) != validation(2)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("sizes", [[1, 1], [1000, 1], [1, 1000], [5] * 40, [10_000, *[10] * 50]])
def test_both_splits_get_something_of_every_domain_with_two_documents(sizes, fraction):
    entries = [_Entry(f"{i}", "d", size) for i, size in enumerate(sizes)]
    assert set(split_documents(entries, fraction, seed=0)) == {0.0, 1.0}


def test_validation_gets_its_share_of_bytes():
    sizes = np.random.default_rng(0).pareto(1.5, 1000) * 1000 + 1
    entries = [_Entry(f"{i}", "d", int(size)) for i, size in enumerate(sizes)]
    shares = np.array(split_documents(entries, 0.1, seed=0))
    assert sizes[shares == 0].sum() / sizes.sum() == pytest.approx(0.1, abs=0.002)


def test_one_file_is_cut_in_two_between_characters(tmp_path):
    (tmp_path / "poem.txt").write_text("ü🙂" * 1001)
    corpus = prepare_corpus([str(tmp_path / "poem.txt")], "bpe:257", tmp_path / "cache")
    ((train,), (validation,)) = (texts(file, corpus.tokenizer) for file in (corpus.train, corpus.validation))
    assert train + validation == "ü🙂" * 1001
    assert len(validation.encode()) == pytest.approx(601, abs=4)


def test_a_cut_in_bytes_that_are_no_text_keeps_them_all(tmp_path):
    (tmp_path / "noise.bin").write_bytes(b"\x80" * 101)
    corpus = prepare_corpus([str(tmp_path / "noise.bin")], "byte", tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (90, 11)


def test_bytes_that_are_not_utf8_suit_bytes_but_not_bpe(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes(b"caf\xe9 " * 20)
    assert prepare_corpus([str(path)], "byte", tmp_path / "cache").train.num_bytes == 90
    for tokenizer in ("bpe:300", train_bpe(["x"], 257)):
        with pytest.raises(ValueError, match=r"old\.txt is not UTF-8 at byte 3 \(0xe9\)"):
            prepare_corpus([str(path)], tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing half-written


@pytest.mark.parametrize("later", [["one", "2"], ["1"], ["1", "2", "3"]])
def test_text_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch, later):
    readings = iter([["1", "2"], later])
    monkeypatch.setattr(
        "moestro.data.corpus.read_documents", lambda *_: [Document(text, text[0]) for text in next(readings)]
    )
    with pytest.raises(ValueError, match="changed while the corpus was prepared"):
        prepare_corpus(None, "byte", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_named(folders, tmp_path):
    path = prepare_corpus(folders, "byte", tmp_path / "cache").train.path
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.tokens is damaged.*delete the folder"):
        prepare_corpus(folders, "byte", tmp_path / "cache")


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.txt").write_text("")
    with pytest.raises(ValueError, match=r"there is no text in .*empty \(files left out: 1 empty\)"):
        prepare_corpus([str(tmp_path / "empty")], "byte", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_too_many_domains_are_refused(tmp_path):
    for i in range(257):
        (tmp_path / f"{i}.txt").write_text("x")
    with pytest.raises(ValueError, match="257 domains, at most 256"):
        prepare_corpus([str(path) for path in tmp_path.glob("*.txt")], "byte", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["bpe", "bpe:x", "bpe:100", "bpe:-5"])
def test_a_bpe_without_a_good_size_is_refused(folders, tmp_path, kind):
    with pytest.raises(ValueError, match=f"tokenizer '{kind}': expected bpe:N, N at least 257"):
        prepare_corpus(folders, kind, tmp_path / "cache")


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(folders, tmp_path, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        prepare_corpus(folders, "byte", tmp_path / "cache", validation_fraction=fraction)


def test_the_description_counts_what_was_skipped(folders, tmp_path):
    (tmp_path / "law" / "scan.pdf").write_bytes(b"%PDF\0")
    lines = prepare_corpus(folders, "byte", tmp_path / "cache").describe()
    assert lines[-1] == "skipped: 1 binary"
    assert lines[0].startswith("train law: 27 documents, ")


def test_the_default_corpus_has_code_and_prose_in_both_splits(tmp_path):
    corpus = prepare_corpus(None, "byte", tmp_path)
    assert corpus.domains == ["code", "prose"]
    assert all(row["bytes"] > 50_000 and row["bytes"] == row["tokens"] for row in corpus.counts)
