import json
from collections import Counter

import pytest

from moestro.data import DOMAINS, Document, default_documents, read_documents


def found(*paths, skipped=None):
    return [(d.name, d.domain, d.data) for d in read_documents(paths, skipped)]


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.md").write_text("a")
    (folder / "deep" / "c.py").write_text("c")
    (folder / "deep" / ".git" / "x").write_text("never seen")
    (folder / ".hidden").write_text("h")
    (folder / "picture").write_bytes(b"\x89PNG\0\1")
    (folder / "nothing.txt").write_text("")
    return folder


def test_a_folder_gives_its_visible_text_files_in_order_and_counts_the_rest(shelf):
    skipped = Counter()
    assert found(shelf, skipped=skipped) == [
        ("shelf/a.md", "shelf", b"a"),
        ("shelf/b.txt", "shelf", b"b"),
        ("shelf/deep/c.py", "shelf", b"c"),
    ]
    assert +skipped == {"hidden": 1, "binary": 1, "empty": 1}


def test_a_glob_gives_its_matches_under_the_name_of_their_folder(shelf):
    assert found(f"{shelf}/**/*.py", f"{shelf}/[b]*.txt") == [
        ("deep/c.py", "deep", b"c"),
        ("shelf/b.txt", "shelf", b"b"),
    ]


def test_a_file_is_its_own_domain_and_is_taken_even_if_binary(shelf):
    assert found(shelf / "a.md", shelf / "picture") == [
        ("a.md", "a", b"a"),
        ("picture", "picture", b"\x89PNG\0\1"),
    ]


def test_a_name_with_the_signs_of_a_glob_is_still_a_file(tmp_path):
    (tmp_path / "what[1].txt").write_text("x")
    assert found(tmp_path / "what[1].txt") == [("what[1].txt", "what[1]", b"x")]


def test_a_file_given_twice_is_read_once(shelf):
    skipped = Counter()
    assert len(found(shelf / "a.md", shelf, f"{shelf}/*.md", skipped=skipped)) == 3
    assert skipped["duplicate"] == 2


def test_jsonl_gives_a_document_per_line_with_its_domain(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"text": "one", "domain": "law"}\n\n{"text": "zwei ü"}\n{"text": ""}\n')
    assert found(path) == [("talk.jsonl:1", "law", b"one"), ("talk.jsonl:3", "talk", "zwei ü".encode())]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"talk\.jsonl:2: malformed json"),
        (b"[" * 100_000, r"talk\.jsonl:2: malformed json \(nested too deeply\)"),
        (b'{"txt": "x"}', r'talk\.jsonl:2: no "text"'),
        (b'{"text": 3}', r'talk\.jsonl:2: no "text"'),
        (b'["text"]', r'talk\.jsonl:2: no "text"'),
        (b'{"text": "x", "domain": 7}', r'talk\.jsonl:2: "domain" is 7'),
        (b'{"text": "\xff"}', r"talk\.jsonl:2: byte 10 of the line is not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        found(path)


def test_a_lone_surrogate_is_named(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"text": "ab\\ud800"}\n')
    with pytest.raises(ValueError, match=r"talk\.jsonl:1 has the lone surrogate '\\ud800' at character 2"):
        found(path)


def test_a_missing_path_and_a_glob_without_matches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder '.*nowhere.txt'.*check the path"):
        found(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"no file matches '.*\*.txt'.*check the pattern"):
        found(f"{tmp_path}/*.txt")


def test_every_python_carries_code_and_prose():
    documents = list(default_documents())
    names = [document.name for document in documents]
    assert {document.domain for document in documents} == set(DOMAINS)
    assert "python/argparse.py" in names
    assert "python-topics/assert" in names
    assert len(set(names)) == len(names)
    assert names == [document.name for document in default_documents()]
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "pydoc_data", "__pycache__"}


def test_a_document_may_be_text_or_bytes():
    assert Document("é", "x").data == Document("é".encode(), "x").data
    assert json.dumps(Document("é", "x", source="x.txt").where) == '"x.txt"'
