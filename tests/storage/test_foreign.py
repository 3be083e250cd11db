"""Caches of other tools, in files the test lays out as they do, to caches of ours: same targets, or one clear sentence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError, PlanMismatchError
from stillroom.storage.interchange.foreign.axolotl import Axolotl
from stillroom.storage.interchange.foreign.came import Rules
from stillroom.storage.interchange.foreign.distillkit import Compression, DistillKit
from stillroom.storage.interchange.foreign.files import find_files
from stillroom.storage.interchange.foreign.importing import ForeignResult, Origin, import_foreign
from stillroom.storage.interchange.foreign.rows import Found, settle
from stillroom.storage.interchange.foreign.topk import TopK
from stillroom.storage.manifest import TokenizerInfo
from stillroom.storage.targets import SparseTargets
from stillroom.storage.verify import verify

V, K = 300, 8
PLAIN = TopK(tokens="input_ids", ids="ids", values_column="logprobs")
Data = dict[str, list[Any]]


def rounding(sequences_S: Any, rows: int) -> Any:
    return np.stack([np.random.default_rng(int(s)).random((rows, 3)) for s in sequences_S]).reshape(-1, 3)


def origin(**changes: Any) -> Origin:
    settings = dict(
        format="topk", teacher="somebody's", tokenizer=TokenizerInfo(fingerprint="t" * 64, vocab_size=V), vocab_size=V,
        pad_id=0, seq_len=None, sequences_per_shard=None, libraries={}, created="",
    )  # fmt: skip
    return Origin(**{**settings, **changes})


def run(source: Path, out: Path, reader: Any = PLAIN, alignment: Any = "next-token", **changes: Any) -> ForeignResult:
    tolerance = changes.pop("mass_tolerance", 1e-3)
    rules = Rules(alignment=alignment, vocab_size=V, token_ids=V, mass_tolerance=tolerance)
    return import_foreign(source, out, reader, rules, origin(**changes), rounding)


@pytest.fixture(scope="module")
def data() -> Data:
    """Seven sequences of 4 to 12 tokens, with the whole log-probabilities they were made of; lists of 5 to 8 entries."""
    rng = np.random.default_rng(0)
    made: Data = {name: [] for name in ("input_ids", "ids", "logprobs", "logits", "lse")}
    for tokens in (12, 4, 7, 9, 5, 11, 6):
        logits_TV = rng.normal(0, 3, (tokens - 1, V)).astype(np.float32).astype(np.float64)
        lse_T = np.log(np.exp(logits_TV).sum(1))
        top = [np.argsort(-row)[: rng.integers(5, K + 1)] for row in logits_TV]
        made["input_ids"].append([int(rng.integers(V)), *(int(ids[rng.integers(len(ids))]) for ids in top)])
        made["ids"].append([ids.tolist() for ids in top])
        made["logprobs"].append([(row[ids] - z).tolist() for row, ids, z in zip(logits_TV, top, lse_T)])
        made["logits"].append([row[ids].tolist() for row, ids in zip(logits_TV, top)])
        made["lse"].append(lse_T.tolist())
    return made


def parquet(data: Data, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(data), path, row_group_size=3)
    return path


def settled(source: Path, reader: Any = PLAIN, alignment: Any = "next-token") -> tuple[Any, ...]:
    """Tokens and targets as an import sees them, before they are cut into shards."""
    rules = Rules(alignment=alignment, vocab_size=V, token_ids=V, mass_tolerance=1e-3)
    parts = list(reader.read(find_files(source)))
    return np.concatenate([part.tokens_T for part in parts]), SparseTargets.concat(
        [settle(part, rules, Found()) for part in parts]
    )


def same(came: tuple[Any, ...], wanted: tuple[Any, ...], what: str) -> None:
    np.testing.assert_array_equal(came[0], wanted[0], what)
    for name in ("offsets", "ids"):
        np.testing.assert_array_equal(getattr(came[1], name), getattr(wanted[1], name), what)
    for name in ("logp", "weights", "label_logp"):
        np.testing.assert_allclose(getattr(came[1], name), getattr(wanted[1], name), rtol=1e-5, err_msg=what)


def targets(out: Path) -> list[tuple[Any, ...]]:
    return [
        (item.tokens.tolist(), item.targets.ids.tolist(), item.targets.weights.tolist(), item.targets.offsets.tolist())
        for item in open_cache(out)
    ]


def test_the_cache_holds_what_the_files_say(data: Data, tmp_path: Path) -> None:
    result = run(parquet(data, tmp_path / "rows.parquet"), tmp_path / "cache", sequences_per_shard=3)
    assert (result.sequences, result.rows, result.shards, result.shards_before, result.draws) == (7, 77, 3, 0, K)
    cache = open_cache(tmp_path / "cache")
    made = cache.manifest
    assert (made.sampler.kind, made.sampler.draws, made.packing.policy, made.packing.seq_len) == (
        "top_k",
        K,
        "separate",
        11,
    )
    assert made.teacher.imported
    assert made.teacher.dtype == "unknown"
    masses = []
    for item, tokens, ids, logps in zip(cache, data["input_ids"], data["ids"], data["logprobs"]):
        rows = len(tokens) - 1
        assert item.tokens[: rows + 1].tolist() == tokens
        assert np.diff(item.targets.offsets).tolist() == [len(x) for x in ids] + [0] * (11 - rows)
        assert np.isnan(item.targets.entropy).all()
        for row in range(rows):
            span = slice(item.targets.offsets[row], item.targets.offsets[row + 1])
            p = dict(zip(ids[row], np.exp(logps[row])))
            masses.append(sum(p.values()))
            assert set(item.targets.ids[span].tolist()) == p.keys()
            assert item.targets.weights[span].sum() == pytest.approx(masses[-1], abs=1e-6)
            # Two levels of the code are at most a factor exp(18/63) apart, below 1/K; the first entry takes the others' rounding.
            for number, weight in zip(item.targets.ids[span][1:], item.targets.weights[span][1:]):
                assert abs(np.log(weight / p[int(number)])) <= 18 / 63 + 1e-6
            assert item.targets.label_logp[row] == pytest.approx(np.log(p[tokens[row + 1]]), abs=1 / 256 + 1e-6)
    assert result.kept_mass == pytest.approx(np.mean(masses))
    assert result.labels_known == 1.0
    assert verify(tmp_path / "cache", hashes=True).sound
    again = run(tmp_path / "rows.parquet", tmp_path / "cache", sequences_per_shard=3)
    assert again.already_done


def by_token(data: Data) -> Data:
    rows: Data = {name: [] for name in ("doc", "token", "ids", "logprobs")}
    for number, (tokens, ids, logps) in enumerate(zip(data["input_ids"], data["ids"], data["logprobs"])):
        rows["doc"] += [f"d{number}"] * len(tokens)
        rows["token"] += tokens
        rows["ids"] += [*ids, None]
        rows["logprobs"] += [*logps, None]
    return rows


def scaled(data: Data, way: Callable[[Any], Any]) -> Data:
    return {**data, "logprobs": [[way(np.array(x)).tolist() for x in lists] for lists in data["logprobs"]]}


def test_every_way_to_write_it_gives_the_same_targets(data: Data, tmp_path: Path) -> None:
    wanted = settled(parquet(data, tmp_path / "rows.parquet"))
    names = dict(tokens="input_ids", ids="ids")
    shifted = {**data, "ids": [[None, *x] for x in data["ids"]], "logprobs": [[[], *x] for x in data["logprobs"]]}
    ways: list[tuple[str, Data, TopK, str]] = [
        ("probability", scaled(data, np.exp), TopK(**names, values_column="logprobs", values="probability"), "next-token"),
        ("log2", scaled(data, lambda x: x / np.log(2)), TopK(**names, values_column="logprobs", values="log2"), "next-token"),
        ("log10", scaled(data, lambda x: x / np.log(10)), TopK(**names, values_column="logprobs", values="log10"), "next-token"),
        ("logit", data, TopK(**names, values_column="logits", values="logit", normaliser="lse"), "next-token"),
        ("this-token", shifted, PLAIN, "this-token"),
        ("token", by_token(data), TopK(tokens="token", ids="ids", values_column="logprobs", sequence="doc"), "next-token"),
    ]  # fmt: skip
    for name, rows, reader, alignment in ways:
        same(settled(parquet(rows, tmp_path / f"{name}.parquet"), reader, alignment), wanted, name)
    # Two files of rows of one token, the cut inside a sequence; Arrow in other types; JSON lines.
    rows = by_token(data)
    for number, part in enumerate((slice(0, 15), slice(15, None))):
        parquet({name: values[part] for name, values in rows.items()}, tmp_path / f"cut/data_{number + 9}.parquet")
    same(settled(tmp_path / "cut", ways[-1][2]), wanted, "cut")
    narrow = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint16())),
            ("ids", pa.large_list(pa.list_(pa.int32()))),
            ("logprobs", pa.list_(pa.list_(pa.float64()))),
        ]
    )
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "saved/data-00000-of-00001.arrow"), narrow) as writer:
        writer.write_table(pa.table({name: data[name] for name in narrow.names}, schema=narrow))
    lines = [json.dumps({name: data[name][i] for name in narrow.names}) for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("saved", "rows.jsonl"):
        same(settled(tmp_path / name), wanted, name)


def test_unknown_labels_scaled_rows_and_cuts(data: Data, tmp_path: Path) -> None:
    rows = {name: [list(x) for x in data[name]] for name in ("input_ids", "ids", "logprobs")}
    missing = next(number for number in range(V) if number not in rows["ids"][0][2])
    rows["input_ids"][0][3] = missing
    rows["logprobs"][1][0] = [
        float(x) for x in np.log(np.full(len(rows["ids"][1][0]), 1.0005 / len(rows["ids"][1][0])))
    ]
    rows["logprobs"][2][1] = [*rows["logprobs"][2][1][:-1], -np.inf]
    result = run(parquet(rows, tmp_path / "rows.parquet"), tmp_path / "cache", seq_len=6)
    cache = open_cache(tmp_path / "cache")
    assert np.isnan(cache[0].targets.label_logp).tolist() == [False, False, True, False, False, False]
    assert cache[1].targets.weights[: cache[1].targets.offsets[1]].sum() == pytest.approx(1.0, abs=1e-6)
    assert np.diff(cache[2].targets.offsets)[1] == len(rows["ids"][2][1]) - 1
    assert (result.scaled, result.zeros, result.most_mass) == (1, 1, pytest.approx(1.0005))
    assert result.rows_cut == sum(max(len(x) - 1 - 6, 0) for x in data["input_ids"])
    assert verify(tmp_path / "cache").sound


def test_a_wrong_alignment_is_seen_in_the_labels(data: Data, tmp_path: Path) -> None:
    # Lists of what follows, given an empty one before them, pose as lists of the token itself.
    late = {
        "input_ids": data["input_ids"],
        "ids": [[*x, []] for x in data["ids"]],
        "logprobs": [[*x, []] for x in data["logprobs"]],
    }
    late = {**late, **{name: [[[], *x[1:]] for x in late[name]] for name in ("ids", "logprobs")}}
    result = run(parquet(late, tmp_path / "rows.parquet"), tmp_path / "cache", alignment="this-token")
    assert result.labels_known < 0.3
    assert result.labels_known_shifted[1] == 1.0


def broken(rows: Data, name: str, sequence: int, place: int, value: Any) -> Data:
    changed = {key: [list(x) for x in rows[key]] for key in ("input_ids", "ids", "logprobs")}
    changed[name][sequence][place] = value
    return changed


@pytest.mark.parametrize(
    ("name", "sequence", "place", "value", "said"),
    [
        ("input_ids", 2, 3, V, "sequence 2, position 3: token id 300 came, wanted 0 to 299"),
        ("input_ids", 2, 3, -1, "sequence 2, position 3: token id -1"),
        ("ids", 4, 1, [1, 2, V], "sequence 4, list 1: id 300 came, wanted 0 to 299"),
        ("ids", 4, 1, [1, 2, 1], "sequence 4, list 1: id 1 comes twice"),
        ("ids", 4, 1, [1, 2], "sequence 4, list 1: 'ids' and 'logprobs' came with 2 and 3 entries"),
        ("logprobs", 4, 1, [-1.0, -2.0, float("nan")], "sequence 4, list 1: a value is NaN"),
        ("logprobs", 4, 1, [-1.0, -2.0, 3.0], "sequence 4, list 1: a log-probability of 3 came, wanted at most 0"),
        ("logprobs", 4, 1, [-0.1, -0.5, -2.0], "sequence 4, list 1: its probabilities sum to 1.6467"),
        ("logprobs", 4, 1, [-1.0, None, -3.0], "`logprobs` holds a null among its numbers"),
        ("logprobs", 4, 1, [-1.0] * 5000, "'ids' and 'logprobs' came with 3 and 5000 entries"),
    ],
)
def test_broken_input_leaves_nothing(
    data: Data, tmp_path: Path, name: str, sequence: int, place: int, value: Any, said: str
) -> None:
    rows = broken(broken(data, "ids", 4, 1, [1, 2, 3]), "logprobs", 4, 1, [-1.0, -2.0, -3.0])
    source = parquet(broken(rows, name, sequence, place, value), tmp_path / "rows.parquet")
    with pytest.raises(InputError) as error:
        run(source, tmp_path / "cache")
    assert said in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_lengths_and_files_that_do_not_fit(data: Data, tmp_path: Path) -> None:
    source = parquet(data, tmp_path / "rows.parquet")

    def said(text: str, file: Path = source, reader: TopK = PLAIN, alignment: str = "next-token") -> None:
        with pytest.raises(InputError) as error:
            run(file, tmp_path / "cache", reader, alignment)
        assert text in str(error.value)
        assert not (tmp_path / "cache").exists()

    said("sequence 0: 11 lists came for 12 tokens, wanted 12, the first of them empty", alignment="this-token")
    fewer = {**data, "ids": [x[1:] for x in data["ids"]], "logprobs": [x[1:] for x in data["logprobs"]]}
    said("sequence 0: 10 lists came for 12 tokens, wanted 11 or 12", parquet(fewer, tmp_path / "a.parquet"))
    uneven = {**data, "logprobs": [*data["logprobs"][:3], data["logprobs"][3][:-1], *data["logprobs"][4:]]}
    said("sequence 3: 'ids' and 'logprobs' came with 8 and 7 lists", parquet(uneven, tmp_path / "b.parquet"))
    first = {**data, "ids": [[*x, [1]] for x in data["ids"]], "logprobs": [[*x, [-1.0]] for x in data["logprobs"]]}
    said("list 0: predicts the first token", parquet(first, tmp_path / "c.parquet"), alignment="this-token")
    short = {name: [*data[name], *extra] for name, extra in (("input_ids", [[3]]), ("ids", [[]]), ("logprobs", [[]]))}
    said("sequence 7: has 1 tokens, wanted 2 or more", parquet(short, tmp_path / "d.parquet"))
    said("holds no column 'top'", reader=TopK(tokens="input_ids", ids="top", values_column="logprobs"))
    said("has the column 'logprobs' as", reader=TopK(tokens="input_ids", ids="logprobs", values_column="logits"))
    rows = by_token(data)
    mixed = {name: values + values[:3] for name, values in rows.items()}
    reader = TopK(tokens="token", ids="ids", values_column="logprobs", sequence="doc")
    said("sequence 'd0' comes back after another one", parquet(mixed, tmp_path / "e.parquet"), reader)
    whole = source.read_bytes()
    (tmp_path / "f.parquet").write_bytes(whole[: len(whole) // 2])
    said("can not be read", tmp_path / "f.parquet")
    with pa.ipc.new_file(str(tmp_path / "wild.arrow"), pa.table(data).schema) as writer:
        writer.write_table(pa.table(data))
    wild, offset = bytearray((tmp_path / "wild.arrow").read_bytes()), np.array([0, 12, 16], "<i4").tobytes()
    wild[wild.index(offset) + 7] ^= 0x20  # far beyond the file: Arrow itself would follow it
    (tmp_path / "wild.arrow").write_bytes(wild)
    said("can not be read", tmp_path / "wild.arrow")
    (tmp_path / "g.jsonl").write_text('{"input_ids": [1, 2], "ids": [[1]], "logprobs": [["a"]]}\n')
    said("line 1: 'logprobs' does not read as", tmp_path / "g.jsonl")
    (tmp_path / "h").mkdir()
    said("holds no data file", tmp_path / "h")
    with pytest.raises(InputError, match="wanted another one for each"):
        TopK(tokens="input_ids", ids="ids", values_column="ids")
    with pytest.raises(InputError, match="logits came without their normaliser"):
        TopK(tokens="input_ids", ids="ids", values_column="logits", values="logit")
    empty = {name: [[[] for _ in x] for x in data[name]] for name in ("ids", "logprobs")}
    said("hold no target", parquet({**data, **empty}, tmp_path / "i.parquet"))


def test_another_reading_of_the_same_files_is_another_cache(data: Data, tmp_path: Path) -> None:
    source = parquet(data, tmp_path / "rows.parquet")
    run(source, tmp_path / "cache")
    with pytest.raises(PlanMismatchError, match=r"teacher\.fingerprint"):
        run(source, tmp_path / "cache", mass_tolerance=0.1)


_KILLED = """
import sys
sys.path[:0] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("foreign_test", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pathlib import Path
import time
def slow(stage, done, total):
    if stage == "write":
        print(done, flush=True)
        time.sleep(60)
rules = module.Rules(alignment="next-token", vocab_size=module.V, token_ids=module.V, mass_tolerance=1e-3)
origin = module.origin(sequences_per_shard=3)
source, out = Path({source!r}), Path({out!r})
module.import_foreign(source, out, module.PLAIN, rules, origin, module.rounding, on_progress=slow)
"""


def test_a_killed_import_goes_on(data: Data, tmp_path: Path) -> None:
    source = parquet(data, tmp_path / "rows.parquet")
    code = _KILLED.format(path=sys.path, file=__file__, source=str(source), out=str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    result = run(source, tmp_path / "cache", sequences_per_shard=3)
    assert (result.shards, result.shards_before) == (3, 1)
    run(source, tmp_path / "whole", sequences_per_shard=3)
    assert targets(tmp_path / "cache") == targets(tmp_path / "whole")
    sealed = [open_cache(tmp_path / where).record(2).objects for where in ("cache", "whole")]
    assert sealed[0] == sealed[1]


# --- DistillKit ------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "d": V + 1, "k": 8, "exact_k": 2, "exact_dtype": "float32", "polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 4}], "delta_encoding": False,
    "normalize_t": False, "error_diffusion": False,
}  # fmt: skip


def bits(numbers: list[int], width: int) -> list[int]:
    """Bytes of integers, highest bit first, filled up with zeros."""
    text = "".join(format(number, f"0{width}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def captured(seed: int = 0) -> tuple[Data, list[list[list[float]]]]:
    """Rows as DistillKit's capture lays them out, with the values they unfold to."""
    rng = np.random.default_rng(seed)
    rows: Data = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    values: list[list[list[float]]] = []
    for tokens in (5, 3, 6):
        rows["input_ids"].append(rng.integers(0, V, tokens).tolist())
        logprobs, indices, unfolded = [], [], []
        for _ in range(tokens - 1):
            exact = np.array([-0.75, -1.5], "<f4") - rng.random(1).astype("<f4")
            terms = np.array([-4.0, -0.25, -0.5], "<f4")
            codes, scale = rng.integers(0, 8, 4).tolist(), np.array([0.0625], "<f2")
            fitted = [float(-4.0 - 0.25 * t - 0.5 * np.sqrt(t)) for t in range(6)]
            for place, code in enumerate(codes):
                fitted[place] += (code - 4) * 0.0625
            packed = [*exact.tobytes(), *terms.tobytes(), *scale.tobytes(), *bits(codes, 3)]
            logprobs.append(packed)
            indices.append(bits(rng.choice(V, 8, replace=False).tolist(), 9))
            unfolded.append([*exact.tolist(), *fitted])
        rows["compressed_logprobs"].append(logprobs)
        rows["bytepacked_indices"].append(indices)
        values.append(unfolded)
    return rows, values


def capture(rows: Data, path: Path) -> Path:
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    pq.write_table(pa.table(rows, schema=schema), path)
    return path


def test_distillkit(tmp_path: Path) -> None:
    rows, values = captured()
    reader = DistillKit(Compression.of(SETTINGS, "config"))
    source = capture(rows, tmp_path / "data_0.parquet")
    (came,) = reader.read((source,))
    np.testing.assert_allclose(came.logp_E, np.concatenate([x for rows in values for x in rows]), rtol=1e-6)
    first = bits(came.ids_E[:8].tolist(), 9)
    assert first == rows["bytepacked_indices"][0][0]
    result = run(source, tmp_path / "cache", reader, mass_tolerance=0.25, format="distillkit")
    assert (result.sequences, result.targets, result.draws) == (3, 11, 8)
    assert result.kept_mass == pytest.approx(np.exp(came.logp_E).sum() / 11)
    assert verify(tmp_path / "cache").sound
    # Steps from the value before; one bit an element; bfloat16.
    deltas = Compression.of(
        {
            "d": V, "k": 4, "exact_k": 2, "exact_dtype": "bfloat16", "delta_encoding": True,
            "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 2}],
        },
        "config",
    )  # fmt: skip
    packed = [0x80, 0xBF, 0x00, 0xBF, 0x00, 0x3F, 0b01000000]  # -1, -0.5, scale 0.5, codes 0 and 1
    np.testing.assert_array_equal(deltas.values(np.array([packed], np.uint8)), [[-1.0, -1.5, -2.0, -1.5]])


def test_distillkit_needs_its_configuration(tmp_path: Path) -> None:
    rows, _ = captured()
    source = capture(rows, tmp_path / "data_0.parquet")
    for changes, said in (
        ({"k": 9}, "a list of 'bytepacked_indices' has 9 bytes, by the compression configuration it has 11"),
        ({"exact_k": 1}, "a list of 'compressed_logprobs' has 24 bytes, by the compression configuration it has 20"),
    ):
        with pytest.raises(InputError) as error:
            run(source, tmp_path / "cache", DistillKit(Compression.of({**SETTINGS, **changes}, "config")))
        assert said in str(error.value)
    for values, said in (
        ({**SETTINGS, "exact_k": 9}, "exact_k came as 9"),
        ({**SETTINGS, "exact_dtype": "int8"}, "exact_dtype came as 'int8'"),
        ({**SETTINGS, "surprise": 1}, "unknown key 'surprise'"),
        ({"k": 8}, "lacks the key 'd'"),
        ({"k": 8, "polynomial_degree": 3}, "no probability can be"),
    ):
        with pytest.raises(InputError, match=said):
            Compression.of(values, "config")
    legacy = {"input_ids": [[1, 2]], "packed_indices": [[[1]]], "exact_values": [[[0.5]]], "coeffs": [[[0.5]]]}
    pq.write_table(pa.table(legacy), tmp_path / "legacy.parquet")
    plain = {"input_ids": [[1, 2]], "token_ids": [[[1]]], "top_values": [[[0.5]]]}
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    for name, said in (("legacy", "centred logits and no normaliser"), ("plain", "--ids-column token_ids")):
        with pytest.raises(InputError, match=said):
            run(tmp_path / f"{name}.parquet", tmp_path / "cache", DistillKit(Compression.of(SETTINGS, "config")))
    assert not (tmp_path / "cache").exists()


# --- axolotl ---------------------------------------------------------------------------------------------------------------


def test_axolotl(data: Data, tmp_path: Path) -> None:
    wanted = settled(parquet(data, tmp_path / "rows.parquet"))
    # Lists of {token, logprob} for all but the first token, as serving engines return them.
    records = [
        [[{"token": f"token_id:{i}", "logprob": x, "rank": 1} for i, x in zip(*one)] for one in zip(ids, logps)]
        for ids, logps in zip(data["ids"], data["logprobs"])
    ]
    source = parquet({"input_ids": data["input_ids"], "logprobs": records}, tmp_path / "v1.parquet")
    same(settled(source, Axolotl(), "this-token"), wanted, "v1")
    numeric = {"input_ids": data["input_ids"], "logprobs": data["logprobs"], "target_token_ids": data["ids"]}
    same(settled(parquet(numeric, tmp_path / "v2.parquet"), Axolotl(), "this-token"), wanted, "v2")
    # Prepared: one k for all, scaled to 1, a list a token, the first two of each sequence masked.
    prepared: Data = {
        name: [] for name in ("input_ids", "labels", "target_logprobs", "target_token_ids", "target_mask")
    }
    for tokens, ids, logps in zip(data["input_ids"], data["ids"], data["logprobs"]):
        scaled_logps = [(np.array(x[:5]) - np.log(np.exp(x[:5]).sum())).tolist() for x in logps]
        prepared["input_ids"].append(tokens)
        prepared["labels"].append([-100, -100, *tokens[2:]])
        prepared["target_logprobs"].append([[-np.inf] * 5, *scaled_logps])
        prepared["target_token_ids"].append([list(range(5)), *(x[:5] for x in ids)])
        prepared["target_mask"].append([[int(place > 1)] * 5 for place in range(len(tokens))])
    source = parquet(prepared, tmp_path / "prepared.parquet")
    result = run(source, tmp_path / "prepared", Axolotl(), "this-token", format="axolotl")
    assert result.kept_mass == pytest.approx(1.0)
    for item, tokens, ids in zip(open_cache(tmp_path / "prepared"), data["input_ids"], data["ids"]):
        n = np.diff(item.targets.offsets)
        assert n.tolist() == [0] + [5] * (len(tokens) - 2) + [0] * (12 - len(tokens))
        assert set(item.targets.ids[:5].tolist()) == set(ids[1][:5])
    assert verify(tmp_path / "prepared").sound

    def said(text: str, rows: Data) -> None:
        with pytest.raises(InputError) as error:
            run(parquet(rows, tmp_path / "bad.parquet"), tmp_path / "bad", Axolotl(), "this-token")
        assert text in str(error.value)

    said("holds text and no token ids", {"messages": [["hello"]], "logprobs": [[[{"token": "a", "logprob": -1.0}]]]})
    said(
        "names a token ' the', wanted `token_id:N`",
        {"input_ids": [[1, 2]], "logprobs": [[[{"token": " the", "logprob": -1.0}]]]},
    )
    half = {**prepared, "target_mask": [[[0, 1, 1, 1, 1]] * len(x) for x in prepared["target_mask"]]}
    said("masks a part of a list", half)
