"""Export to Parquet, Arrow and `datasets`, opened by those tools as it is, and imported back without losing a bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_made import SPECS  # made.py, by way of conftest

from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import (
    CacheError,
    DamagedError,
    FormatError,
    InputError,
    NotACacheError,
    PlanMismatchError,
)
from stillroom.storage.interchange.plan import ExportPlan, columns
from stillroom.storage.interchange.reading import import_cache
from stillroom.storage.interchange.writing import export_cache
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter

KINDS = ("parquet", "arrow", "datasets")


PROFILES = ("standard", "fast", "small")


def plan(made, name: str, profile: str = "standard"):
    vocab_size = 70_000 if name in ("threshold", "random", "top_k") else 300
    return made.manifest(SPECS[name], vocab_size=vocab_size, sequences=7, sequences_per_shard=3, profile=profile)


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "threshold"
    made.write(root, plan(made, "threshold"))
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    (root / "tokenizer/surprise.py").write_text("raise SystemExit")
    return root


@pytest.fixture(scope="module")
def exports(cache, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for to in KINDS:
        export_cache(cache, root / to, to=to, shards_per_file=2)
    return {to: root / to for to in KINDS}


@pytest.fixture
def rows(exports, tmp_path) -> Path:
    """A Parquet export to break."""
    shutil.copytree(exports["parquet"], tmp_path / "rows")
    return tmp_path / "rows"


def shard_files(root: Path) -> dict[str, bytes]:
    """Bytes of every object of every shard, whatever its attempt is named."""
    found = {}
    for record in sorted((root / "commits").glob("*.json")):
        folder = root / json.loads(record.read_text())["path"]
        found |= {f"{record.stem}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SPECS)
def test_there_and_back_is_bit_exact(made, tmp_path, name, profile):
    made.write(tmp_path / "cache", plan(made, name, profile))
    for to in KINDS if profile == "standard" else ("arrow",):
        result = export_cache(tmp_path / "cache", tmp_path / to, to=to, shards_per_file=2)
        assert (result.files, result.files_before, result.sequences, result.rows) == (2, 0, 7, 112)
        back = import_cache(tmp_path / to, tmp_path / f"{to} back")
        assert (back.shards, back.shards_before, back.identical) == (3, 0, 3)
        assert shard_files(tmp_path / f"{to} back") == shard_files(tmp_path / "cache")
        made_by = [(tmp_path / where / "manifest.json").read_bytes() for where in ("cache", f"{to} back")]
        assert made_by[0] == made_by[1]
    assert verify(tmp_path / "arrow back", hashes=True).sound


def test_columns_are_what_the_cache_decodes_to(cache, exports):
    opened = open_cache(cache)
    table = pq.read_table(exports["parquet"] / "data")
    assert {name: table.schema.field(name).type for name in table.schema.names} == columns(opened.manifest)
    for index, row in enumerate(table.to_pylist()):
        tokens, targets = opened[index]
        assert row["sequence"] == index
        assert row["tokens"] == tokens.tolist()
        assert row["n"] == np.diff(targets.offsets).tolist()
        assert row["ids"] == targets.ids.tolist()
        for name in ("weights", "logp", "label_logp", "entropy"):
            np.testing.assert_array_equal(np.array(row[name], np.float32), getattr(targets, name))


def test_no_logp_column_where_the_cache_keeps_none(made, tmp_path):
    assert "logp" not in columns(plan(made, "random"))
    assert "logp" in columns(plan(made, "head only"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets_opens_every_kind_offline(cache, exports, tmp_path):
    import datasets

    opened = open_cache(cache)
    # A hub's dataset repository is such a folder.
    for to in ("parquet", "arrow"):
        loaded = datasets.load_dataset(str(exports[to]), split="train", cache_dir=str(tmp_path))
        assert loaded.num_rows == 7
        assert loaded.features["ids"] == datasets.List(datasets.Value("int32"))
        assert loaded[4]["tokens"] == opened[4].tokens.tolist()
        stream = datasets.load_dataset(str(exports[to]), split="train", streaming=True)
        assert [row["sequence"] for row in stream] == list(range(7))
    saved = datasets.load_from_disk(str(exports["datasets"]))
    assert saved.num_rows == 7
    assert saved.split == "train"
    assert saved[4]["ids"] == opened[4].targets.ids.tolist()


def test_files_are_named_for_load_dataset(exports):
    names = sorted(str(p.relative_to(exports["parquet"])) for p in exports["parquet"].rglob("*") if p.is_file())
    assert names == [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "stillroom.json",
        "tokenizer/tokenizer.json",  # plain kinds of file only: no code travels
    ]
    import yaml

    front = yaml.safe_load((exports["parquet"] / "README.md").read_text().split("---")[1])
    assert front["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]


def test_export_goes_on_where_it_stopped(cache, exports, tmp_path):
    out = tmp_path / "rows"
    seen = []
    shutil.copytree(exports["parquet"], out)
    first, second = sorted((out / "data").iterdir())
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])  # cut: made again
    before = first.stat().st_mtime_ns
    result = export_cache(cache, out, on_progress=lambda done, total: seen.append((done, total)))
    assert (result.files, result.files_before, result.already_done) == (2, 1, False)
    assert seen == [(1, 1)]
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == before
    assert export_cache(cache, out).already_done


@pytest.mark.parametrize("to", ["arrow", "datasets"])
def test_a_file_that_ends_early_is_made_again(cache, exports, tmp_path, to):
    out = tmp_path / "rows"
    shutil.copytree(exports[to], out)
    path = out / ExportPlan.load(out).file_name(0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert export_cache(cache, out, to=to).files_before == 1
    assert path.read_bytes() == whole


def test_a_failed_write_leaves_nothing_behind(cache, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    record = json.loads((broken / "commits/000001.json").read_text())
    path = broken / record["path"] / "id_lo/c/0/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"shard 1: .*delete commits/000001\.json"):
        export_cache(broken, tmp_path / "rows", shards_per_file=1)
    assert [p.name for p in (tmp_path / "rows/data").iterdir()] == ["train-00000-of-00003.parquet"]
    path.unlink()
    shutil.rmtree(broken)
    shutil.copytree(cache, broken)
    assert export_cache(broken, tmp_path / "rows", shards_per_file=1).files_before == 1


def test_other_exports_and_other_folders_are_refused(made, cache, exports, rows, tmp_path):
    other = tmp_path / "other"
    made.write(other, plan(made, "random"))
    with pytest.raises(PlanMismatchError, match=r"sampler\.kind"):
        export_cache(other, rows)
    with pytest.raises(PlanMismatchError, match="to: parquet, now arrow"):
        export_cache(cache, rows, to="arrow")
    with pytest.raises(PlanMismatchError, match="shards_per_file: 2, now 1"):
        export_cache(cache, rows, shards_per_file=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("keep me")
    with pytest.raises(InputError, match="holds other files"):
        export_cache(cache, tmp_path / "full")
    with pytest.raises(InputError, match="choose one of parquet"):
        export_cache(cache, tmp_path / "new", to="csv")
    incomplete = CacheWriter(tmp_path / "incomplete", plan(made, "threshold"))
    with pytest.raises(CacheError, match="lacks 3 of 3 shards"):
        export_cache(incomplete.root, tmp_path / "new")
    # A data file of another export under the name of this one's.
    name = "data/train-00000-of-00002.parquet"
    export_cache(other, tmp_path / "of other", shards_per_file=2)
    shutil.copy(tmp_path / "of other" / name, rows / name)
    with pytest.raises(PlanMismatchError, match="is of another export"):
        export_cache(cache, rows)
    with pytest.raises(FormatError, match=r"lacks the column 'logp'"):
        import_cache(rows, tmp_path / "back")


def test_import_goes_on_where_it_stopped(cache, exports, rows, tmp_path):
    path = rows / "data/train-00001-of-00002.parquet"
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(3)  # in the middle of a page: found only when it is read
    data = bytearray(whole)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"train-00001-of-00002\.parquet"):
        import_cache(rows, tmp_path / "back")
    path.write_bytes(whole)
    seen = []
    result = import_cache(rows, tmp_path / "back", on_progress=lambda done, total: seen.append((done, total)))
    assert (result.shards, result.shards_before, result.identical) == (3, 2, 1)
    assert seen == [(1, 1)]
    assert shard_files(tmp_path / "back") == shard_files(cache)
    assert (tmp_path / "back/tokenizer/tokenizer.json").read_text() == '{"version": "1.0"}'
    assert import_cache(rows, tmp_path / "back").already_done
    # One shard in the middle of a file is missing: its neighbours are passed over.
    (tmp_path / "back/commits/000001.json").unlink()
    assert import_cache(rows, tmp_path / "back").identical == 1


def test_import_into_another_run(made, rows, tmp_path):
    made.write(tmp_path / "other", plan(made, "random"))
    with pytest.raises(PlanMismatchError, match="belongs to another run"):
        import_cache(rows, tmp_path / "other")


def edit(folder: Path, change) -> None:
    """Write the first data file anew with changed columns, its metadata kept."""
    path = folder / "data/train-00000-of-00002.parquet"
    table = pq.read_table(path)
    values = {name: table.column(name).to_pylist() for name in table.column_names}
    types = {name: table.schema.field(name).type for name in table.column_names}
    change(values)
    schema = pa.schema([pa.field(name, types[name]) for name in values], metadata=table.schema.metadata)
    pq.write_table(pa.table(values, schema=schema), path)


def set_item(column, row, place, value):
    def change(values):
        values[column][row][place] = value

    return change


def drop_row(values):
    for column in values.values():
        del column[1]


def swap_rows(values):
    for column in values.values():
        column[0], column[1] = column[1], column[0]


def consistent_lie(values):
    """Another label log-probability, plain and code alike: only the digest knows."""
    values["code_label_logp"][1][2] = 128
    values["label_logp"][1][2] = -1.0


def other_ids(values):
    values["ids"][1][0] += 1


EDITS = {
    "weight": (set_item("weights", 1, 0, 0.5), "`weights` is not what the stored codes"),
    "weight nan": (set_item("weights", 1, 0, float("nan")), "`weights` is not what the stored codes"),
    "logp": (set_item("logp", 1, 0, -0.5), "`logp` is not what the stored codes"),
    "entropy": (set_item("entropy", 1, 0, 99.0), "`entropy` is not what the stored codes"),
    "id too high": (set_item("ids", 1, 0, 70_000), "not below the vocabulary size|do not ascend"),
    "id negative": (set_item("ids", 1, 0, -1), "negative"),
    "another id": (other_ids, "digest|twice|do not ascend|out of order"),
    "token": (set_item("tokens", 1, 3, 70_000), "token id is not below"),
    "another token": (set_item("tokens", 1, 3, 7), "sequence 1: its codes are not those"),
    "n": (set_item("n", 1, 0, 60_000), "wanted at most 21"),
    "n one more": (lambda v: v["n"][1].__setitem__(0, v["n"][1][0] + 1), "another number of elements"),
    "list too short": (lambda v: v["tokens"][1].pop(), "`tokens` holds another number"),
    "code list too long": (lambda v: v["code_logp_tail"][1].append(1), "`code_logp_tail` holds another number"),
    "head codes": (set_item("code_logp_head", 1, 0, 3), "negative"),
    "tail code": (set_item("code_tail", 1, 0, 255), "negative|sum to 1"),
    "more heads than entries": (set_item("code_n_head", 1, 0, 250), "more head entries"),
    "null list": (lambda v: v["ids"].__setitem__(1, None), "`ids` holds a null"),
    "null value": (set_item("weights", 1, 0, None), "`weights` holds a null"),
    "null sequence": (lambda v: v["sequence"].__setitem__(1, None), "`sequence` holds a null"),
    "sequence number": (lambda v: v["sequence"].__setitem__(1, 5), "sequences .* came, wanted 0 to 2, in order"),
    "rows swapped": (swap_rows, "sequences .* came, wanted 0 to 2, in order"),
    "row missing": (drop_row, "holds 5 sequences, wanted 0 to 5"),
    "consistent lie": (consistent_lie, "sequence 1: its codes are not those its `digest`"),
    "digest": (lambda v: v["digest"].__setitem__(1, "0" * 64), "sequence 1: its codes"),
    "digest null": (lambda v: v["digest"].__setitem__(1, None), "sequence 1: its codes"),
}


def test_a_hub_snapshot_is_a_folder_of_links(exports, cache, tmp_path):
    """What a hub's client keeps: snapshots/<revision>/* are links to blobs/<hash>. Other links are not followed."""
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in exports["parquet"].rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(exports["parquet"])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "tokenizer/secret.json").symlink_to(tmp_path / "secret.json")
    assert import_cache(snapshot, tmp_path / "back").identical == 3
    assert shard_files(tmp_path / "back") == shard_files(cache)
    assert [p.name for p in (tmp_path / "back/tokenizer").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("name", EDITS)
def test_import_refuses_what_no_export_holds(rows, tmp_path, name):
    change, words = EDITS[name]
    edit(rows, change)
    with pytest.raises(DamagedError, match=words) as caught:
        import_cache(rows, tmp_path / "back")
    assert "train-00000-of-00002.parquet" in str(caught.value)
    assert not list((tmp_path / "back").glob("commits/*.json")), "nothing of a bad file is committed"


def test_a_foreign_schema_is_named(rows, tmp_path):
    edit(rows, lambda values: values.pop("code_tail"))
    with pytest.raises(FormatError, match=r"lacks the column 'code_tail' \(list<item: uint8>\)"):
        import_cache(rows, tmp_path / "back")
    path = rows / "data/train-00000-of-00002.parquet"
    pq.write_table(pa.table({"text": ["once"]}), path)
    with pytest.raises(FormatError, match="lacks the column 'sequence'"):
        import_cache(rows, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_type_is_named(exports, rows, tmp_path):
    path = rows / "data/train-00000-of-00002.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("weights")
    wide = table.column("weights").cast(pa.list_(pa.float64()))
    pq.write_table(table.set_column(place, "weights", wide), path)
    with pytest.raises(FormatError, match="'weights' as list<element: double>, wanted list<item: float>"):
        import_cache(rows, tmp_path / "back")


def test_a_file_written_again_by_another_tool_is_taken(exports, rows, tmp_path, cache):
    # Same rows, other compression, row groups and a column of one's own.
    for path in (rows / "data").iterdir():
        table = pq.read_table(path)
        table = table.append_column("note", pa.array(["mine"] * table.num_rows))
        pq.write_table(table, path, compression="snappy", row_group_size=2)
    assert import_cache(rows, tmp_path / "back").identical == 3
    assert shard_files(tmp_path / "back") == shard_files(cache)


def test_plans_that_cannot_be(exports, rows, tmp_path):
    with pytest.raises(NotACacheError, match=r"holds no stillroom\.json"):
        import_cache(tmp_path, tmp_path / "back")
    file = rows / "stillroom.json"
    plan_json = json.loads(file.read_text())
    for changes, words in (
        ({"format": "parquet"}, "this stillroom reads"),
        ({"format_version": 2}, "upgrade stillroom"),
        ({"to": "csv"}, "choose one of parquet"),
        ({"shards_per_file": 0}, "wanted 1 or more"),
        ({"shards_per_file": True}, "wanted int"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"manifest": 3}, "lacks the key 'manifest'"),
        ({"shards_per_file": 1}, "can not be read|is not the file"),
    ):
        file.write_text(strict.dumps(strict.sealed(plan_json | changes)))
        with pytest.raises((FormatError, DamagedError), match=words):
            import_cache(rows, tmp_path / "back")
    file.write_text(json.dumps(plan_json | {"shards_per_file": 3}))
    with pytest.raises(FormatError, match="checksum"):
        import_cache(rows, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", KINDS)
def test_flips_and_cuts_are_never_taken(cache, exports, tmp_path, to):
    """A single flipped bit or a cut anywhere in a data file: refused, or without any effect on what comes back."""
    rows = tmp_path / "rows"
    shutil.copytree(exports[to], rows)
    path = rows / ExportPlan.load(rows).file_name(0)
    whole, expected = path.read_bytes(), shard_files(cache)
    rng = np.random.default_rng(KINDS.index(to))
    refused = 0
    for trial in range(24):
        data = bytearray(whole)
        if trial % 6 == 5:
            data = data[: int(rng.integers(len(data)))]
        else:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        out = tmp_path / f"back {trial}"
        try:
            import_cache(rows, out)
        except (DamagedError, FormatError):
            refused += 1
        else:
            assert shard_files(out) == expected
    assert refused >= 8


def test_a_small_file_that_unfolds_to_much_is_refused_unread(rows, tmp_path):
    path = rows / "data/train-00000-of-00002.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("code_entropy")
    ends = np.array([0, *range(20_000_000, 20_000_081, 16)], np.int32)
    bomb = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.zeros(ends[-1], np.uint8)))
    pq.write_table(table.set_column(place, "code_entropy", bomb), path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DamagedError, match=r"code_entropy.* claims 20,000,080 values .* more than they can have"):
        import_cache(rows, tmp_path / "back")


def test_arrow_offsets_out_of_range(exports, tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(exports["arrow"], rows)
    path = rows / "data/train-00000-of-00002.arrow"
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        arrays = batches[0].columns
        place = batches[0].schema.get_field_index("ids")
        bad = np.frombuffer(arrays[place].buffers()[1], np.int32).copy()
        bad[1] = 1 << 30
        buffers = [None, pa.py_buffer(bad.tobytes())]
        arrays[place] = pa.Array.from_buffers(
            arrays[place].type, len(arrays[place]), buffers, children=[arrays[place].values]
        )
        batches[0] = pa.RecordBatch.from_arrays(arrays, schema=batches[0].schema)
        with pa.OSFile(str(rows / "new"), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    (rows / "new").replace(path)
    with pytest.raises(DamagedError, match="Arrow arrays are invalid"):
        import_cache(rows, tmp_path / "back")
