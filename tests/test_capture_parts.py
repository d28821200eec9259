"""Parts of a capture, in any order and number, are the bytes of one run."""

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import test_capture
import transformers as tf
from test_capture import files

from pipeline import artifacts, capture, locks
from pipeline.config import Config, Dtype, Store
from pipeline.errors import ArtifactError, ResourceError
from pipeline.locks import Part
from pipeline.stages import CAPTURE
from pipeline.stages import capture as stage
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

upstream = test_capture.upstream
SHARDS = 16
"""Of a layer, in the project of `upstream`."""


@pytest.fixture
def cfg(upstream: Config) -> Config:
    upstream.runtime.lock_wait_s = 0.2
    upstream.capture = replace(upstream.capture, dtype=Dtype.float32)
    return upstream


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry for every dense model that is loaded."""
    seen: list[str] = []
    real = tf.LlamaForCausalLM.from_pretrained.__func__  # type: ignore

    def from_pretrained(cls, name, *args, **kwargs):
        seen.append(str(name))
        return real(cls, name, *args, **kwargs)

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    return seen


def run(cfg: Config, part: Part | None) -> Path:
    return stage.run(cfg, part=part, published=False)


def whole(cfg: Config) -> dict[str, bytes]:
    """What one run makes of it; nothing of it is left."""
    made = files(run(cfg, None))
    shutil.rmtree(".scratch")
    assert sum(name.startswith("layer_0.zarr/commits/") for name in made) == SHARDS
    return made


# Dealing


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("shards", [1, 2, 15, 16])
def test_parts_are_disjoint_ranges_that_are_everything_and_of_like_size(shards: int, n: int):
    items = list(range(shards))
    dealt = [capture.deal(items, (i, n)) for i in range(1, n + 1)]
    assert [item for part in dealt for item in part] == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_parts_whose_locks_do_not_overlap_share_no_shard(n: int):
    """Of whatever numbers: the locks are ranges of `locks.SPAN` as parts are of the shards."""
    for m in (1, 2, 3, 5, 7, 64):
        for i in range(1, n + 1):
            for j in range(1, m + 1):
                spans = [set_of(locks.SPAN, part) for part in ((i, n), (j, m))]
                shards = [set_of(SHARDS, part) for part in ((i, n), (j, m))]
                if not overlap(*spans):
                    assert not overlap(*shards)


def set_of(size: int, part: Part) -> range:
    return range(size)[slice(*((k * size) // part[1] for k in (part[0] - 1, part[0])))]


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


# The same bytes


@pytest.mark.parametrize("store", Store)
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_one_after_the_other_give_the_bytes_of_one_run(
    cfg: Config, loads: list[str], capsys: pytest.CaptureFixture, store: Store, order: list[int]
):
    """Manifest and all; then the stage publishes what it finds."""
    cfg.capture = replace(cfg.capture, store=store)
    wanted = whole(cfg)
    for i in order:
        work = run(cfg, (i, 3))
        assert (work / artifacts.MANIFEST).exists() == (i == order[-1])
    assert files(work) == wanted
    loads.clear()
    assert stage.run(cfg) == CAPTURE
    assert "found complete" in capsys.readouterr().out and not loads
    assert files(CAPTURE) == wanted


def test_parts_of_unlike_numbers_fit_together(cfg: Config):
    wanted = whole(cfg)
    for part in ((1, 2), (3, 4), (7, 8), (15, 16), (31, 32), (32, 32)):
        work = run(cfg, part)
    assert files(work) == wanted


def test_more_parts_than_shards_leave_some_empty_and_say_so(
    cfg: Config, capsys: pytest.CaptureFixture, loads: list[str]
):
    wanted = whole(cfg)
    run(cfg, (1, 40))
    assert f"part 1/40 holds none of the {SHARDS} shards" in capsys.readouterr().out
    loads.clear()
    run(cfg, (2, 40))
    assert not loads, "the stores of the first part say that there is nothing to do"
    for i in range(3, 41):
        work = run(cfg, (i, 40))
    assert files(work) == wanted and len(loads) == SHARDS


def test_a_part_writes_its_own_shards_and_no_others(cfg: Config):
    work = run(cfg, (2, 3))
    for k in (0, 1):
        commits = {p.stem for p in (work / f"layer_{k}.zarr/commits").iterdir()}
        sizes = {"heldout": 4, "train": 8, "validation": 4}
        shards = [(split, n) for split, size in sizes.items() for n in range(size)]
        assert commits == {f"{split}_{n:05d}" for split, n in shards[5:10]}
    with pytest.raises(ArtifactError, match="missing"):
        LayerReader(work / "layer_0.zarr")


# Run again


def test_a_part_that_is_complete_loads_no_model(cfg: Config, loads: list[str]):
    for _ in range(2):
        run(cfg, (1, 2))
    assert len(loads) == 1
    for _ in range(2):
        run(cfg, (2, 2))
    run(cfg, (1, 2))
    assert len(loads) == 2


def test_a_run_that_finds_every_shard_and_no_manifest_seals_without_a_model(
    cfg: Config, loads: list[str]
):
    """What a kill between the last commit and the manifest leaves."""
    wanted = files(run(cfg, None))
    for part in (None, (2, 2)):
        (work := run(cfg, None)).joinpath(artifacts.MANIFEST).unlink()
        loads.clear()
        assert files(run(cfg, part)) == wanted and files(work) == wanted
        assert not loads


def test_a_part_run_again_writes_only_what_is_missing(cfg: Config):
    work = run(cfg, (1, 2))
    wanted = files(work)
    lost = work / "layer_1.zarr/commits/train_00003.json"
    lost.unlink()
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    run(cfg, (1, 2))
    assert files(work) == wanted
    changed = {p for p, was in before.items() if p.stat().st_mtime_ns != was}
    assert changed == {work / f"layer_1.zarr/train/{side}/c.3.0" for side in ("input", "output")}


def test_a_damaged_shard_is_not_sealed_and_its_part_writes_it_again(cfg: Config):
    wanted = whole(cfg)
    work = run(cfg, (1, 2))
    shard = work / "layer_0.zarr/train/input/c.2.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run(cfg, (2, 2))
    assert not (work / artifacts.MANIFEST).exists()
    run(cfg, (1, 2))
    assert files(work) == wanted


@pytest.mark.parametrize("name", ["ffn_1.safetensors", "layer_0.zarr/train/input/c.2.0"])
def test_of_a_finished_capture_only_what_is_damaged_is_made_again(cfg: Config, name: str):
    wanted = files(run(cfg, None))
    work = run(cfg, None)
    flip(work / name)
    before = {p: p.stat().st_mtime_ns for p in work.rglob("c.*") if p.is_file()}
    assert files(run(cfg, None)) == wanted
    changed = {p for p, was in before.items() if p.stat().st_mtime_ns != was}
    layer = work / "layer_0.zarr/train"
    again = {layer / side / "c.2.0" for side in ("input", "output")}
    assert changed == (again if "zarr" in name else set())


def test_a_damaged_ffn_of_an_interrupted_capture_is_written_again_and_not_sealed(cfg: Config):
    wanted = files(run(cfg, None))
    work = run(cfg, None)
    (work / artifacts.MANIFEST).unlink()
    flip(work / "ffn_1.safetensors")
    run(cfg, (2, 2))
    assert not (work / artifacts.MANIFEST).exists() or files(work) == wanted
    assert files(run(cfg, None)) == wanted


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_part_makes_a_damaged_manifest_again(cfg: Config):
    wanted = files(run(cfg, None))
    work = run(cfg, None)
    (work / artifacts.MANIFEST).write_text("{}")
    run(cfg, (2, 3))
    assert files(work) == wanted


def test_an_ffn_that_is_not_the_one_of_a_store_of_inputs_is_not_sealed(cfg: Config):
    cfg.capture = replace(cfg.capture, store=Store.input)
    work = run(cfg, (1, 2))
    shutil.copy(work / "ffn_1.safetensors", work / "ffn_0.safetensors")
    with pytest.raises(ArtifactError, match="outputs_from"):
        run(cfg, (2, 2))
    assert not (work / artifacts.MANIFEST).exists()


# Beside others


def test_a_part_leaves_what_another_is_writing_and_a_run_alone_removes_it(cfg: Config):
    work = run(cfg, (1, 2))
    halves = [
        work / "layer_0.zarr/train/input/c.6.0.partial",
        work / "layer_0.zarr/commits/train_00006.json.partial",
        work / "layer_7.zarr.0123.partial",
        work / "ffn_0.safetensors.0123.partial",
    ]
    for half in halves:
        half.write_text("half")
    lost = work / "layer_0.zarr/commits/heldout_00000.json"  # of the first part's
    lost.unlink()
    run(cfg, (1, 4))
    assert lost.exists()
    assert all(half.exists() for half in halves)
    run(cfg, None)
    assert not any(half.exists() for half in halves)


def test_of_two_that_begin_a_store_at_once_the_first_ones_stays(tmp_path: Path):
    from test_store import SETTINGS

    from pipeline import hierarchy

    path = tmp_path / "layer_0.zarr"
    LayerWriter.open(path, **SETTINGS)
    found = path.stat().st_ino
    content = {key: (path / key).read_bytes() for key in files(path) if key.endswith("zarr.json")}
    hierarchy.create(path, content)
    assert path.stat().st_ino == found and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A lock of which another process holds part 2 of 4; and its pid."""
    path = tmp_path / "locks" / "capture-0"
    code = f"""
        import time
        from pathlib import Path
        from pipeline import locks
        with locks.lock_part(Path({str(path)!r}), (2, 4), 1):
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdout.readline() == "held\n"
        yield path, child.pid
        child.kill()


@pytest.mark.parametrize("part", [None, (2, 4), (1, 1), (1, 2), (3, 8), (3, 7)])
def test_a_held_part_keeps_out_what_overlaps_and_is_named(held: tuple[Path, int], part):
    path, pid = held
    lock = locks.lock_part(path, part, 0) if part else locks.lock(path, 0)
    with pytest.raises(ResourceError, match=rf"pid {pid} on .* \(part 2/4\)"), lock:
        pass


@pytest.mark.parametrize("part", [(1, 4), (3, 4), (2, 2), (5, 8), (1, 40)])
def test_a_held_part_lets_in_what_does_not_overlap(held: tuple[Path, int], part: Part):
    path, _ = held
    with locks.lock_part(path, part, 0):
        pass


def test_a_run_alone_keeps_parts_out(tmp_path: Path):
    path = tmp_path / "capture-0"
    with (
        locks.lock(path, 0),
        pytest.raises(ResourceError, match="pid"),
        locks.lock_part(path, (1, 4), 0),
    ):
        pass
    with locks.lock_part(path, (1, 4), 0):
        pass


def test_the_name_of_a_killed_part_goes_with_the_next_run_alone(tmp_path: Path):
    path = tmp_path / "capture-0"
    left = tmp_path / "capture-0.holder.1-4"
    left.write_text("pid 1 on a-machine-that-is-gone (part 1/4)")
    with locks.lock(path, 0):
        assert "gone" not in locks.read_holder(Path(f"{path}.holder"))
    assert not left.exists()


def test_a_part_waits_for_a_run_of_all_of_it(cfg: Config):
    work = run(cfg, None)
    lock = Path(".scratch/locks") / f"capture-{work.name}"
    with locks.lock(lock, 0), pytest.raises(ResourceError, match="Another run works on"):
        run(cfg, (1, 2))
