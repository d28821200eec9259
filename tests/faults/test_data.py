"""Text that cannot be used ends `tokens` with 3, with what was seen of it.

Rows 9 and 10 of docs/reliability.md, by the stage as a command on real files.
"""

from pathlib import Path

import pytest
from injection import Stand


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", ["every row is blank, or there is none"]),
        ("blank.txt", b"\n\n  \n\t\n", ["every row is blank"]),
        ("blank.jsonl", b'{"text": ""}\n{"text": "  "}\n', ["every row is blank"]),
        ("column.jsonl", b'{"body": "a", "title": "b"}\n', ["columns body, title", "text_column"]),
        ("numbers.jsonl", b'{"text": 3}\n', ["data.text_column=text"]),
        ("latin.txt", "déjà vu\n".encode("latin-1") * 40, ["UTF-8"]),
        ("latin.jsonl", b'{"text": "d\xe9j\xe0"}\n', ["UTF-8"]),
        ("torn.jsonl", b'{"text": "a"}\n{"text": ', ["one JSON object per line"]),
        ("torn.parquet", b"PAR1 and nothing else", ["parquet"]),
        ("text.csv", b"text\na\n", [".txt, .jsonl, .parquet"]),
        ("short.txt", b"a few words and no more\n", ["too little text for one block", "tokens"]),
    ],
)
def test_text_that_cannot_be_used_is_refused_with_what_was_seen(
    stand: Stand, name: str, content: bytes, said: list[str]
):
    path: Path = stand.root / name
    path.write_bytes(content)
    before = sorted((stand.root / "stages/tokens").iterdir())
    ended = stand.run("tokens", ["data=files", f"data.files=[{path}]"]).check(3)
    assert all(words in ended.said for words in [*said, "rule:", "remedy:"]), ended.said
    assert "Traceback" not in ended.said
    assert sorted((stand.root / "stages/tokens").iterdir()) == before


def test_a_file_that_was_edited_is_read_again(stand: Stand):
    """Its name and the settings are the same."""
    path, made = stand.root / "text.txt", []
    for word in ("one", "two", "one"):
        path.write_text("".join(f"{word} {i} {i * i}\n" for i in range(9000)))
        ended = stand.run("tokens", ["data=files", f"data.files=[{path}]"]).check(0)
        made.append((stand.root / "stages/tokens/train.safetensors").read_bytes())
    assert made[0] == made[2] != made[1]
    assert "found complete" in ended.said


def test_a_file_that_is_not_there_is_refused_by_its_whole_path(stand: Stand):
    ended = stand.run("tokens", ["data=files", "data.files=[none/*.txt]"]).check(3)
    assert str(stand.root / "none/*.txt") in ended.said
