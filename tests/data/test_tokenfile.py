import numpy as np
import pytest

from moestro.data import TokenFile, write_tokens

ONES = np.ones(256, dtype=np.int32)


def documents():
    yield np.frombuffer(b"hello", dtype=np.uint8), 1, 5
    yield np.frombuffer(b"", dtype=np.uint8), 0, 0
    yield np.frombuffer(b"cats", dtype=np.uint8), 0, 4


@pytest.fixture
def path(tmp_path):
    write_tokens(tmp_path / "x.tokens", documents(), ONES)
    return tmp_path / "x.tokens"


def test_a_token_file_gives_back_what_was_written(path):
    file = TokenFile(path)
    assert bytes(file.tokens) == b"hellocats"
    assert file.domains.tolist() == [1] * 5 + [0] * 4
    assert file.offsets.tolist() == [0, 5, 9]
    assert file.document_bytes.tolist() == [5, 4]
    assert file.piece_bytes.tolist() == ONES.tolist()
    assert (len(file), file.num_documents, file.num_bytes) == (9, 2, 9)
    assert file.counts(2) == {"documents": [1, 1], "tokens": [4, 5], "bytes": [4, 5]}
    assert [p.name for p in path.parent.iterdir()] == ["x.tokens"]


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_take_the_fewest_bytes_that_hold_them(tmp_path, vocab, dtype):
    top = np.array([0, vocab - 1])
    file = write_tokens(tmp_path / "x.tokens", [(top, 0, 2)], np.ones(vocab))
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == top.tolist()


def test_every_flipped_bit_is_noticed(path):
    data = path.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"x\.tokens .*; delete the folder .* and prepare the corpus again"):
            TokenFile(path)
    path.write_bytes(data)
    TokenFile(path)


@pytest.mark.parametrize("lost", [1, 8, 1000, None])
def test_a_truncated_file_is_noticed(path, lost):
    data = path.read_bytes()
    path.write_bytes(data[:-lost] if lost else b"")
    with pytest.raises(ValueError, match=r"x\.tokens"):
        TokenFile(path)


def test_a_file_that_grew_is_noticed(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match=r"x\.tokens has \d+ bytes, expected \d+"):
        TokenFile(path)


def test_a_missing_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no token file"):
        TokenFile(tmp_path / "x.tokens")
    (tmp_path / "x.tokens").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="does not begin like a token file"):
        TokenFile(tmp_path / "x.tokens")


def test_a_write_that_fails_leaves_what_was_there(path):
    def broken():
        yield np.arange(3), 0, 3
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_tokens(path, broken(), ONES)
    assert bytes(TokenFile(path).tokens) == b"hellocats"
    assert [p.name for p in path.parent.iterdir()] == ["x.tokens"]


def test_tokens_cannot_be_written_to(path):
    with pytest.raises(ValueError, match="read-only"):
        TokenFile(path).tokens[0] = 1
