"""Text that is read faithfully, split without leaks and packed without ragged ends."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import corpus
from pipeline.config import DataConfig, DataSource, TokensConfig
from pipeline.documents import (
    RUN_CHARACTERS,
    Document,
    embedded_documents,
    file_documents,
    hub_documents,
    read_documents,
    shifted_documents,
    source_documents,
)
from pipeline.errors import InputError
from pipeline.pretrain import train_tokenizer


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(embedded_documents())


@pytest.fixture(scope="module")
def splits(documents: list[Document]) -> dict[str, list[Document]]:
    return corpus.split(documents)


@pytest.fixture(scope="module")
def tokenizer(splits: dict[str, list[Document]]):
    return train_tokenizer(splits["train"], vocab_size=2048)


def words(n: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 10**6, n))


def windows(tokens: np.ndarray, width: int = 16) -> set[bytes]:
    view = np.lib.stride_tricks.sliding_window_view(tokens, width)
    return {row.tobytes() for row in np.ascontiguousarray(view)}


def leaked_share(tokens: np.ndarray, known: set[bytes], width: int = 16) -> float:
    """Share of `tokens` that lie in a run of `width` tokens that is in `known`."""
    covered = np.zeros(len(tokens), dtype=bool)
    for start in range(len(tokens) - width + 1):
        if tokens[start : start + width].tobytes() in known:
            covered[start : start + width] = True
    return float(covered.mean())


# Splits


@pytest.mark.parametrize("chosen", ["validation", "heldout"])
def test_split_leaks_under_three_percent_of_the_embedded_text(splits, tokenizer, chosen):
    """The tokens that `_novel` and deduplication leave in runs of 16 that train also has."""
    known = windows(corpus.pack(tokenizer, splits["train"], 1).reshape(-1))
    tokens = corpus.pack(tokenizer, splits[chosen], 1).reshape(-1)
    assert leaked_share(tokens, known) < 0.03


def test_leak_measure_sees_the_leak_that_split_removes(documents, splits, tokenizer):
    """Without deduplication more than 3 % leaks: the bound above is not met by chance."""
    naive: dict[str, list[Document]] = {name: [] for name in corpus.SHARES}
    for document in documents:
        naive[corpus._assign(document.source)].append(document)
    known = windows(corpus.pack(tokenizer, naive["train"], 1).reshape(-1))
    tokens = corpus.pack(tokenizer, naive["heldout"], 1).reshape(-1)
    assert leaked_share(tokens, known) > 0.03


def test_split_keeps_a_source_together_and_enough_of_each_part(documents, splits):
    sources = {name: {d.source for d in part} for name, part in splits.items()}
    assert not sources["train"] & sources["validation"]
    assert not sources["train"] & sources["heldout"]
    assert not sources["validation"] & sources["heldout"]
    size = {name: sum(len(d.text) for d in part) for name, part in splits.items()}
    assert size["train"] > 1_200_000
    assert min(size["validation"], size["heldout"]) > 80_000


def test_split_does_not_depend_on_the_order_of_the_documents(documents, splits):
    by_source: dict[str, list[Document]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    shuffled = [d for source in sorted(by_source, reverse=True) for d in by_source[source]]
    assert corpus.split(shuffled) == splits


def test_split_keeps_one_of_documents_that_differ_in_case_and_space():
    text = words(50, 0)
    same = [Document("a", text), Document("b", text.upper()), Document("c", f"  {text}\n\n")]
    assert sum(len(part) for part in corpus.split(same).values()) == 1


def test_split_drops_what_quotes_the_training_text():
    """A document one tenth of which stands in train never reaches validation or heldout."""
    pool = [Document(words(1, seed), words(200, seed)) for seed in range(40)]
    train = corpus.split(pool)["train"]
    quote = " ".join(train[0].text.split()[:40])
    sources = [f"source {i}" for i in range(40)]
    quoting = [Document(s, f"{words(200, 1000 + i)} {quote}") for i, s in enumerate(sources)]
    kept = corpus.split([*pool, *quoting])
    for name in ("validation", "heldout"):
        assert kept[name]
        assert not [d for d in kept[name] if quote in d.text]
    assert [d for d in kept["train"] if d.source in sources]


# Reading


def test_embedded_documents_are_the_docstrings_of_this_interpreter(documents):
    import argparse

    texts = {d.text for d in documents if d.source == "argparse.py"}
    assert argparse.Action.__doc__ and argparse.Action.__doc__.split()[0] in " ".join(texts)
    assert not [d for d in documents if d.source.startswith(("test/", "/", "tkinter/"))]
    assert sum(len(d.text) for d in documents) > 1_500_000


def test_source_documents_hold_code_without_docstrings_and_comments():
    taken = {d.source: d.text for d, _ in zip(source_documents(), range(12), strict=False)}
    for name, text in taken.items():
        compile(text, name, "exec")
        assert not [line for line in text.splitlines() if line.lstrip().startswith(("#", '"""'))]
    assert sum(len(text) for text in taken.values()) > 10_000


def test_file_documents_read_txt_jsonl_and_parquet(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("first line\nsecond line\n\nafter a blank")
    (tmp_path / "b.jsonl").write_text('{"body": "row one"}\n{"body": null}\n{"body": "row two"}\n')
    parquet.write_table(pa.table({"body": ["row three"]}), tmp_path / "c.parquet")
    names = [str(tmp_path / name) for name in ("a.txt", "*.jsonl", "c.parquet")]
    texts = [d.text for d in file_documents(names, "body")]
    assert texts == [
        "first line\nsecond line\n\nafter a blank",
        "row one",
        "row two",
        "row three",
    ]


def test_file_documents_join_lines_to_runs_and_lose_none(tmp_path: Path):
    lines = [f"{i} {words(12, i)}" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    read = list(file_documents([str(tmp_path / "a.txt")], "text"))
    assert "\n".join(d.text for d in read).splitlines() == lines
    assert all(RUN_CHARACTERS - 1 <= len(d.text) < 2 * RUN_CHARACTERS for d in read[:-1])
    assert len({d.source for d in read}) == len(read) > 3


def test_rows_with_and_without_a_newline_keep_their_order(tmp_path: Path):
    rows = ["a line\n", "the next\n", "a row of its own", "a last line\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    texts = [d.text for d in file_documents([str(tmp_path / "a.jsonl")], "text")]
    assert texts == ["a line\nthe next", "a row of its own", "a last line"]


def test_a_file_that_cannot_be_read_is_told_with_the_setting_that_names_it(tmp_path: Path):
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n{')
    for name in ("broken.jsonl", "none.txt", "other.csv"):
        files = [str(tmp_path / name)]
        other = data_config(DataSource.files, files=["a.txt"], shifted_files=files)
        with pytest.raises(InputError) as refusal:
            list(shifted_documents(other))
        assert "data.shifted_files" in refusal.value.remedy, name
        with pytest.raises(InputError) as refusal:
            list(read_documents(data_config(DataSource.files, files=files)))
        assert "data.files" in refusal.value.remedy, name


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("empty.txt", b"", "every row is blank"),
        ("empty.jsonl", b"", "every row is blank"),
        ("blank.txt", b"\n \n\n", "every row is blank"),
        ("nulls.jsonl", b'{"text": null}\n', "every row is blank"),
        ("column.jsonl", b'{"body": "x", "id": 1}\n', "columns body, id"),
        ("number.jsonl", b'{"text": 1}\n', "columns text"),
        ("latin.txt", b"caf\xe9 au lait\n", "can't decode byte 0xe9"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "can't decode byte 0xe9"),
        ("broken.jsonl", b'{"text": "x"\n{', "JSON parse error"),
        ("false.parquet", b"not parquet", "magic bytes"),
        ("unknown.csv", b"a,b\n", "unknown.csv"),
    ],
)
def test_file_documents_refuse_what_holds_no_text(tmp_path: Path, name, content, seen):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        list(file_documents([str(tmp_path / name)], "text"))
    assert str(tmp_path / name) in str(refusal.value.value)
    assert seen in str(refusal.value.value)


def test_a_name_with_brackets_is_a_file_where_there_is_one(tmp_path: Path):
    for name in ("a[1].txt", "b1.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    names = [str(tmp_path / "a[1].txt"), str(tmp_path / "b[1].txt")]
    assert [d.text for d in file_documents(names, "text")] == ["a[1].txt", "b1.txt"]


@pytest.mark.parametrize(("value", "kind"), [(["a", "b"], "list"), (3, "int")])
def test_a_column_that_is_no_text_is_refused_by_its_type(tmp_path: Path, value: object, kind: str):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(InputError, match=f"a value of type {kind} there"):
        list(file_documents([str(tmp_path / "a.jsonl")], "text"))


def test_file_documents_refuse_a_pattern_that_matches_nothing(tmp_path: Path):
    with pytest.raises(InputError, match=r"\*\.txt"):
        list(file_documents([str(tmp_path / "*.txt")], "text"))


def test_hub_documents_refuse_a_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    cfg = data_config(DataSource.hub)
    cfg.dataset = "nobody/nothing"
    with pytest.raises(InputError, match="nobody/nothing"):
        list(hub_documents(cfg))


# Blocks


class Words:
    """A tokenizer of one id per word."""

    def __init__(self, eos: int | None, bos: int | None, *frame: int) -> None:
        self.eos_token_id, self.bos_token_id = eos, bos
        self.cls_token_id, self.sep_token_id = frame or (None, None)
        self.bare = not frame

    def __call__(self, texts: str | list[str], **_: object) -> dict[str, list]:
        if isinstance(texts, str):
            return {"input_ids": [7] if self.bare else [self.cls_token_id, 7, self.sep_token_id]}
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def numbers(*texts: str) -> list[Document]:
    return [Document(text, text) for text in texts]


@pytest.mark.parametrize(("eos", "bos", "separator"), [(0, 1, [0]), (None, 1, [1])])
def test_pack_ends_each_document_with_the_separator(eos, bos, separator):
    blocks = corpus.pack(Words(eos, bos), numbers("5 6", "7"), 5)  # type: ignore[arg-type]
    assert blocks.dtype == np.int32
    assert blocks.tolist() == [[5, 6, *separator, 7, *separator]]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    sequence_length=st.integers(1, 20),
    budget=st.none() | st.integers(20, 300),
)
def test_pack_is_a_prefix_of_the_stream_in_whole_blocks(lengths, sequence_length, budget):
    texts = [" ".join(str(i + 2) for i in range(n)) for n in lengths]
    stream = [i for text in texts for i in [*map(int, text.split()), 0]]
    if min(len(stream), budget or len(stream)) < sequence_length:
        return
    blocks = corpus.pack(Words(0, None), numbers(*texts), sequence_length, budget)  # type: ignore[arg-type]
    usable = len(stream[:budget])
    assert blocks.shape == (usable // sequence_length, sequence_length)
    assert blocks.reshape(-1).tolist() == stream[: blocks.size]


def test_pack_frames_each_block_where_the_tokenizer_frames_its_texts():
    encoder = Words(None, None, 101, 102)
    texts = numbers("5 6 7", "8", "9 10 11")
    blocks = corpus.pack(encoder, texts, 4)  # type: ignore[arg-type]
    assert blocks.tolist() == [[101, 5, 6, 102], [101, 7, 8, 102], [101, 9, 10, 102]]
    assert corpus.pack(encoder, texts, 4, 11).tolist() == blocks[:2].tolist()  # type: ignore[arg-type]


def test_pack_frames_nothing_where_a_causal_tokenizer_only_knows_both_tokens():
    causal = Words(0, 1, 101, 102)
    causal.bare = True
    blocks = corpus.pack(causal, numbers("5 6", "7"), 5)  # type: ignore[arg-type]
    assert blocks.tolist() == [[5, 6, 0, 7, 0]]


@pytest.mark.parametrize(("words", "read"), [(3, 96), (1000, 1)])
def test_pack_reads_no_further_than_its_budget(words, read):
    given = []

    def endless() -> Iterable[Document]:
        while True:
            given.append(" ".join("2" for _ in range(words)))
            yield Document("a", given[-1])

    assert corpus.pack(Words(0, None), endless(), 8, 80).shape == (10, 8)  # type: ignore[arg-type]
    assert len(given) == read, "as many as hold six characters for each token"


@pytest.mark.parametrize("budget", [None, 3])
def test_pack_refuses_less_than_one_block(budget):
    with pytest.raises(InputError, match="6 tokens") as refusal:
        corpus.pack(Words(0, None), numbers("5 6", "7 8"), 7, budget, "heldout")  # type: ignore[arg-type]
    assert "heldout" in refusal.value.what and "7 tokens" in refusal.value.rule


def test_check_token_ids_refuses_an_id_without_an_embedding_row():
    blocks = torch.tensor([[0, 99]])
    corpus.check_token_ids(blocks, 100)
    with pytest.raises(InputError, match=r"token id 99, 99 embedding rows"):
        corpus.check_token_ids(blocks, 99)


# The whole stage


def data_config(source: DataSource, **changes: object) -> DataConfig:
    cfg = DataConfig(
        source=source,
        split="train",
        streaming=False,
        files=[],
        shifted_files=[],
        text_column="text",
        sequence_length=32,
        tokens=TokensConfig(train=4096, validation=1024, heldout=1024, shifted=1024),
    )
    for name, value in changes.items():
        setattr(cfg, name, value)
    return cfg


def test_write_blocks_gives_the_blocks_that_the_dense_model_may_see(tokenizer, splits, tmp_path):
    corpus.write_blocks(data_config(DataSource.embedded), tokenizer, tmp_path)
    record = json.loads((tmp_path / "tokens.json").read_text())["splits"]
    for name, part in splits.items():
        blocks = corpus.read_blocks(tmp_path, name)
        assert blocks.numel() == record[name]["tokens"] == record[name]["budget"]
        assert np.array_equal(blocks, corpus.pack(tokenizer, part, 32, blocks.numel()))
    text = tokenizer.decode(corpus.read_blocks(tmp_path, "shifted").reshape(-1))
    assert "import" in text or "def " in text
    assert record["shifted"]["bytes"] == pytest.approx(len(text.encode()), rel=0.05)


def test_write_blocks_of_files_reads_only_what_the_budget_needs(tokenizer, tmp_path: Path):
    rows = [json.dumps({"text": words(60, seed)}) for seed in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    budget = TokensConfig(train=2048, validation=256, heldout=256, shifted=256)
    (tmp_path / "unread.jsonl").write_text(rows[0])
    files = [str(tmp_path / name) for name in ("rows.jsonl", "unread.jsonl")]
    cfg = data_config(DataSource.files, files=files, tokens=budget)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    corpus.write_blocks(cfg, tokenizer, tmp_path / "a")
    (tmp_path / "unread.jsonl").write_text("not a row")
    corpus.write_blocks(cfg, tokenizer, tmp_path / "b")
    for name in ("train", "validation", "heldout", "shifted"):
        first, second = (corpus.read_blocks(tmp_path / x, name) for x in "ab")
        assert torch.equal(first, second)


# data.max_samples


def test_max_samples_of_the_embedded_text_keep_to_the_splits_of_the_whole(documents, splits):
    """Else `heldout` would hold what the dense model was trained on, or near copies of it."""
    cfg = data_config(DataSource.embedded, max_samples=5000)
    read, cut = corpus.read_splits(cfg)
    assert read == 5000
    first = set(documents[:5000])
    assert cut == {name: [d for d in part if d in first] for name, part in splits.items()}
    by_itself = corpus.split(documents[:5000])
    assert set(by_itself["heldout"]) - set(cut["heldout"]), "a smaller text splits otherwise"


def test_max_samples_beyond_the_embedded_text_change_nothing(documents, splits):
    found = corpus.read_splits(data_config(DataSource.embedded, max_samples=10_000))
    assert found == (len(documents), splits) and len(documents) < 10_000


def test_max_samples_of_files_are_counted_over_them_all_and_before_deduplication(tmp_path: Path):
    rows = [json.dumps({"text": words(60, seed // 2)}) for seed in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:30]))
    (tmp_path / "b.jsonl").write_text("\n".join(rows[30:]))
    (tmp_path / "unread.jsonl").write_text("not a row")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "unread")]
    read, parts = corpus.read_splits(data_config(DataSource.files, files=files, max_samples=36))
    texts = {d.text for part in parts.values() for d in part}
    assert read == 36 and texts == {words(60, seed) for seed in range(18)}
    read, parts = corpus.read_splits(data_config(DataSource.files, files=files[:2]))
    assert read == 40 and sum(map(len, parts.values())) == 20


def test_max_samples_are_joined_runs_where_rows_are_lines(tmp_path: Path):
    lines = [f"{i} {words(12, i)}" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    files = [str(tmp_path / "a.txt")]
    read, parts = corpus.read_splits(data_config(DataSource.files, files=files, max_samples=2))
    runs = [d.text for d in file_documents(files, "text")]
    assert len(runs) > 2 < len(runs[0].splitlines())
    assert read == 2 and {d.text for part in parts.values() for d in part} == set(runs[:2])


def test_write_blocks_record_how_many_documents_were_read(tokenizer, tmp_path: Path):
    rows = [json.dumps({"text": words(60, seed)}) for seed in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    files = [str(tmp_path / "a.jsonl")]
    cfg = data_config(DataSource.files, files=files, shifted_files=files)
    for max_samples, read in ((60, 60), (80, 80), (None, 100)):
        cfg.max_samples = max_samples
        corpus.write_blocks(cfg, tokenizer, tmp_path)
        assert json.loads((tmp_path / "tokens.json").read_text())["documents"] == read


def test_too_few_samples_for_a_split_are_refused_with_the_setting(tokenizer, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": words(60, 0)}) for _ in "ab"))
    cfg = data_config(DataSource.files, files=[str(tmp_path / "a.jsonl")], max_samples=1)
    with pytest.raises(InputError, match="too little text") as refusal:
        corpus.write_blocks(cfg, tokenizer, tmp_path)
    assert "data.max_samples" in refusal.value.remedy


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_documents_are_those_of_the_subset_the_split_and_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
):
    """On a folder laid out as a dataset of the hub is, with two subsets of two splits."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, entries = tmp_path / "dataset", []
    folder.mkdir()
    for subset in ("a", "b"):
        entries.append(f"- config_name: {subset}\n  data_files:")
        for part in ("train", "test"):
            row = {"said": f"{subset} {part}", "text": "another column"}
            (folder / f"{subset}_{part}.jsonl").write_text(json.dumps(row) + "\n")
            entries.append(f"  - {{split: {part}, path: {subset}_{part}.jsonl}}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(entries) + "\n---\n")
    for subset, part in (("a", "train"), ("b", "test")):
        asked = {"dataset": str(folder), "subset": subset, "split": part, "streaming": streaming}
        cfg = data_config(DataSource.hub, text_column="said", **asked)
        assert [document.text for document in hub_documents(cfg)] == [f"{subset} {part}"]


def test_max_samples_of_a_streamed_hub_dataset_are_all_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its second file is no data: who opens it fails."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = [words(60, seed) for seed in range(20)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "train-0.jsonl").write_text("".join(rows))
    (folder / "train-1.jsonl").write_text("not a row")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n"
        "  - {split: train, path: [train-0.jsonl, train-1.jsonl]}\n---\n"
    )
    asked = {"dataset": str(folder), "subset": "a", "streaming": True}
    cfg = data_config(DataSource.hub, **asked)
    with pytest.raises(InputError, match="cannot be read"):
        corpus.read_splits(cfg)
    for n in (7, 20):
        cfg.max_samples = n
        read, parts = corpus.read_splits(cfg)
        assert read == n
        assert {d.text for part in parts.values() for d in part} == set(texts[:n])
