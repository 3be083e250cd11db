"""One teacher held by several processes (gloo, CPU): the cache of one process up to the last bit of a logit, and how it ends.

Run as a program this file is one of the processes. Shapes: `R` rows, `E` entries, `V` vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stillroom.cli import main
from stillroom.pipeline.config import CacheConfig, TeacherConfig
from stillroom.pipeline.engines.joined import check_engine, joined, seat
from stillroom.pipeline.engines.ranks import Place, place
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.stages import sample_sequences
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.verify import verify
from tests.conftest import llama_config, make_tokenizer

ROWS = 32
FIELDS = ("offsets", "ids", "weights", "logp", "label_logp", "entropy")
# Logits of these teachers reach 30: float32 steps of 2e-6, and a row-parallel sum takes one more of them than a plain one for
# each of the two layers. A log-probability is a difference of two such numbers.
LOGP_TOLERANCE = 2e-5


def _runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_runs", Path(__file__).with_name("engine_runs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _runs()


def llama(folder: Path, vocab_size: int = 300, **changes: Any) -> Path:
    from transformers import LlamaForCausalLM

    make_tokenizer(folder, 300)
    torch.manual_seed(2)
    LlamaForCausalLM(llama_config(vocab_size, **changes)).save_pretrained(folder)
    return folder


def settings(teacher: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = dict(
        teacher=str(teacher), data=str(text), out=out, seq_len=ROWS, sequences_per_shard=2, batch_size=4,
        max_sequences=19, dtype="float32",
    )  # fmt: skip
    return {**common, **changes}


def together(processes: int, folder: Path, given: dict[str, Any], **changes: Any) -> Any:
    """A run of `processes` under torchrun, two of them a worker."""
    return runs.Run("torchrun", processes, folder, {**given, "tensor_parallel": 2}, **changes)


def assert_near(cache: Cache, alone: Cache) -> None:
    """The same tokens and rows; targets of nearly every row the same.

    A last bit of a logit (1e-5) moves a stored code where the dither that rounds it lies within 1e-5 / (1/128) of the edge, 1/128
    being the finest step, and an id where a draw lies within 1e-5 of one: with 20 entries a row, 3 % and 0.02 % of the rows.
    """
    assert cache.manifest.identity == alone.manifest.identity
    assert cache.manifest.teacher == alone.manifest.teacher
    assert len(cache) == len(alone)
    rows = differ = moved = 0
    for index in range(len(alone)):
        a, b = cache[index], alone[index]
        np.testing.assert_array_equal(a.tokens, b.tokens)
        for name in ("label_logp", "entropy"):
            np.testing.assert_allclose(getattr(a.targets, name), getattr(b.targets, name), atol=0.04)
        for row in range(ROWS):
            x, y = (t.targets.slice_rows(row, row + 1) for t in (a, b))
            same_ids = np.array_equal(x.ids, y.ids)
            rows, moved = rows + 1, moved + (not same_ids)
            differ += not (same_ids and np.allclose(x.weights, y.weights, rtol=1e-4, atol=0.0))
    assert moved <= 1 + rows // 500
    assert differ <= rows * 0.03


def test_two_processes_through_the_command_line(text_file: Path, tmp_path: Path) -> None:
    """Tied embeddings, and a vocabulary that two do not divide."""
    given = settings(llama(tmp_path / "teacher", 301), text_file, tmp_path / "c")
    said = together(2, tmp_path / "run", given).to_end()
    assert said.count("(0 were there)") == 1  # one of them speaks
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.vocab_size == 301
    assert not verify(tmp_path / "c", hashes=True).findings
    build_cache(CacheConfig(**{**given, "out": tmp_path / "alone"}))
    assert_near(cache, open_cache(tmp_path / "alone"))


# ---- places and refusals ---------------------------------------------------------------------------------------------


def _under_torchrun(rank: int, world: int) -> dict[str, str]:
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    return {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}


def _config(tmp_path: Path, **changes: Any) -> CacheConfig:
    return CacheConfig(**{**dict(teacher="t", data="d", out=tmp_path, tensor_parallel=4), **changes})


@pytest.mark.parametrize(
    ("rank", "world", "said", "wanted"),
    [
        (0, 4, {}, (0, 0, 1)),
        (3, 4, {}, (3, 0, 1)),
        (5, 8, {}, (1, 1, 2)),
        (5, 8, {"rank": 2, "ranks": 3}, (1, 5, 6)),  # of three torchruns
    ],
)
def test_every_so_many_are_a_worker(
    rank: int, world: int, said: dict[str, int], wanted: tuple[int, int, int], tmp_path: Path
) -> None:
    config, told = _config(tmp_path, **said), _under_torchrun(rank, world)
    within, at = seat(config, place(config, told), told)
    assert (within, at.rank, at.ranks) == wanted


def test_processes_that_are_no_groups(tmp_path: Path) -> None:
    config = _config(tmp_path)
    for told, words in (
        (_under_torchrun(0, 6), "torchrun started 6 processes, wanted a multiple of 4"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "RANK is not set: start the command with torchrun"),
    ):
        with pytest.raises(InputError, match=words), joined(config, Place(0, 1), told):
            pass
    for changes, words in (
        ({"engine": "local"}, "--engine local, whose workers are one process each"),
        ({"engine": "ray"}, "--engine ray, whose workers are one process each"),
        ({"device_map": "auto"}, "--device-map both came"),
    ):
        with pytest.raises(InputError, match=words):
            check_engine(_config(tmp_path, **changes))
    check_engine(config)


def test_not_under_torchrun(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--teacher", str(teacher_folder), "--data", str(text_file), "--tensor-parallel", "2"]
    for verb, out in (("cache", ["--out", str(tmp_path / "c")]), ("plan", [])):
        assert main([verb, *common, *out]) == 2
        said = capsys.readouterr().err
        assert "torchrun --nproc-per-node 2 -m stillroom" in said
        assert "Traceback" not in said
    with pytest.raises(InputError, match="to one process alone"):
        Teacher(TeacherConfig(teacher=str(teacher_folder), tensor_parallel=2))


# ---- long ones -------------------------------------------------------------------------------------------------------


def gemma(folder: Path) -> Path:
    """Logits with a soft-cap, which the model itself gathers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=301, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, final_logit_softcapping=5.0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def mixture(folder: Path) -> Path:
    """Experts, whose matrices the library cuts in strides."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(2)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(teacher: Path, folder: Path, **changes: Any) -> str:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    given: dict[str, Any] = dict(
        r=2, lora_alpha=8, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(teacher), peft.LoraConfig(**{**given, **changes}))
    model.save_pretrained(folder)
    return str(folder)


def _tokens(sequences: int = 6) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.random.default_rng(0).integers(0, 190, (sequences, ROWS + 1)).astype(np.uint32)


def _logits(teacher: Teacher) -> np.ndarray[Any, np.dtype[np.float32]]:
    return torch.cat(list(teacher.logits(torch.from_numpy(_tokens(1)[:, :-1].astype(np.int64))))).numpy()


def _facts(teacher: Teacher) -> list[str]:
    return [teacher.fingerprint, str(teacher.chunked_head), str(teacher.vocab_size)]


def _drawn(teacher: Teacher) -> dict[str, Any]:
    targets = sample_sequences(teacher, SamplerSpec(), _tokens(), 5, batch_size=4)
    teacher.together(_logits)
    arrays = {f"{name}{i}": getattr(one, name) for i, one in enumerate(targets) for name in FIELDS}
    return {"logits_RV": _logits(teacher), "facts": np.array(_facts(teacher)), **arrays}


def program(folder: Path) -> None:
    """Every teacher of the list, one after another, by the processes that torchrun started."""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    for number, given in enumerate(json.loads((folder / "teachers.json").read_text())):
        config = CacheConfig(**given, data="d", out=folder, tensor_parallel=world, dtype="float32")
        with suppress(SystemExit), joined(config, Place(0, 1)) as (_, group):  # which is how the others leave
            np.savez(folder / f"{number}.npz", **_drawn(Teacher(config, group)))


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of peft, about ways in which it is used here
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_targets_and_identity_of_one_process(processes: int, teacher_folder: Path, tmp_path: Path) -> None:
    """Exact targets before any code: whoever holds the teacher, however its head is made."""
    many = llama(tmp_path / "many", 301, num_attention_heads=6, num_key_value_heads=6, hidden_size=48, head_dim=8)
    teachers: list[dict[str, Any]] = [{"teacher": str(many)}]
    if processes == 2:
        untied = llama(tmp_path / "untied", 301, tie_word_embeddings=False)
        teachers += [
            {"teacher": str(untied)},
            {"teacher": str(llama(tmp_path / "padded", 384)), "vocab_size": 300},
            {"teacher": str(llama(tmp_path / "nothing-left", 384)), "vocab_size": 190},  # of 384, for the second
            {"teacher": str(gemma(tmp_path / "gemma"))},
            {"teacher": str(mixture(tmp_path / "mixture"))},
            {"teacher": str(teacher_folder), "adapter": adapter(teacher_folder, tmp_path / "adapter")},
        ]
    (tmp_path / "teachers.json").write_text(json.dumps(teachers))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__,
        str(tmp_path),
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=True, timeout=300)
    whole_heads = []
    for number, given in enumerate(teachers):
        teacher = Teacher(TeacherConfig(**given, dtype="float32"))
        wanted, found = _drawn(teacher), np.load(tmp_path / f"{number}.npz")
        assert found["facts"][0] == teacher.fingerprint, given
        assert int(found["facts"][2]) == teacher.vocab_size == found["logits_RV"].shape[1]
        if found["facts"][1] == "False":
            whole_heads.append(number)
        np.testing.assert_allclose(found["logits_RV"], wanted["logits_RV"], atol=LOGP_TOLERANCE)
        moved = 0
        for i in range(len(_tokens())):
            for name in ("label_logp", "entropy"):
                np.testing.assert_allclose(found[f"{name}{i}"], wanted[f"{name}{i}"], atol=LOGP_TOLERANCE)
            if not np.array_equal(found[f"ids{i}"], wanted[f"ids{i}"]):
                moved += 1
                continue
            np.testing.assert_allclose(found[f"logp{i}"], wanted[f"logp{i}"], atol=LOGP_TOLERANCE)
        assert moved <= 1, given
    assert whole_heads == ([3, 4] if processes == 2 else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": "documents"}, {"entries_per_row": 9.5}, {"sampler": "random", "exponent": 0.8}],
    ids=["plain", "documents", "entries", "random"],
)
def test_cache_of_one_process(changes: dict[str, Any], teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = settings(teacher_folder, text_file, tmp_path / "c", **changes)
    together(2, tmp_path / "run", given).to_end()
    build_cache(CacheConfig(**{**given, "out": tmp_path / "alone"}))
    assert_near(open_cache(tmp_path / "c"), open_cache(tmp_path / "alone"))


@pytest.mark.slow
def test_same_bytes_every_time_and_by_two_groups(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    found = []
    for number, processes in enumerate((2, 2, 4)):
        given = settings(teacher_folder, text_file, tmp_path / f"c{number}")
        run = together(processes, tmp_path / f"run{number}", given)
        run.to_end()
        found.append(runs.digests(tmp_path / f"c{number}"))
        assert len({process for process, _ in run.begun()}) == processes // 2
    assert found[0] == found[1] == found[2]


# ---- the end ---------------------------------------------------------------------------------------------------------


def fails(run: Any, words: str) -> str:
    """The run ends by itself, all processes with status 2 and one sentence; what was said."""
    process = run.start()
    try:
        assert process.wait(200) == 1  # torchrun's own
    finally:
        runs.end(process)
    said = (run.log.parent / "out.txt").read_text()
    assert said.count("stillroom: ") == said.count(words) == 1, said[-4000:]
    assert "exitcode  : 2 " in said
    return str(said)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of peft, about ways in which it is used here
@pytest.mark.slow
def test_refused_by_one_sentence(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    peft = pytest.importorskip("peft")
    make_tokenizer(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    odd = llama(tmp_path / "odd", num_attention_heads=2, num_key_value_heads=1)
    quantised = llama(tmp_path / "quantised")
    described = json.loads((quantised / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(described))
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(teacher_folder),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    model.save_pretrained(tmp_path / "ia3")
    for number, (teacher, changes, words) in enumerate((
        (tmp_path / "gpt2", {}, "(gpt2) has no tensor-parallel plan in transformers"),
        (odd, {}, "has 2 attention heads and 1 key-value heads"),
        (quantised, {}, "is quantised"),
        (teacher_folder, {"adapter": tmp_path / "ia3"}, "is no plain LoRA"),
        (teacher_folder, {"adapter": adapter(teacher_folder, tmp_path / "on", target_modules=["lm_head"])}, "can not be put on"),
        (teacher_folder, {"data": tmp_path / "nowhere.jsonl"}, "nowhere.jsonl"),  # the leader's alone
    )):  # fmt: skip
        given = settings(teacher, text_file, tmp_path / "c", **changes)
        fails(together(2, tmp_path / f"run{number}", given), words)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that gives NaN from a certain word on to the end of the sequence."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = llama(tmp_path_factory.mktemp("spoilt"), tie_word_embeddings=False)
    model = LlamaForCausalLM.from_pretrained(folder)
    word = AutoTokenizer.from_pretrained(folder)(" fire")["input_ids"][0]
    nn.Module.get_submodule(model, "model.embed_tokens").weight.data[word] = torch.nan  # type: ignore[operator]
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_bad_logits(spoilt: Path, text_file: Path, tmp_path: Path) -> None:
    said = fails(
        together(2, tmp_path / "a", settings(spoilt, text_file, tmp_path / "c")), "NaN or infinite at sequence"
    )
    assert "--skip-bad-rows" in said
    given = settings(spoilt, text_file, tmp_path / "c", skip_bad_rows=True)
    together(2, tmp_path / "b", given).to_end()
    result = build_cache(CacheConfig(**{**given, "out": tmp_path / "alone"}))
    assert 0 < result.stats.bad_rows < 19 * ROWS
    cache, alone = open_cache(tmp_path / "c"), open_cache(tmp_path / "alone")
    assert_near(cache, alone)
    for index in range(len(alone)):
        np.testing.assert_array_equal(
            np.diff(cache[index].targets.offsets) > 0, np.diff(alone[index].targets.offsets) > 0
        )


SHORT = """
import os, sys, torch
from stillroom.cli import main
from stillroom.pipeline.teacher import Teacher
body, calls = Teacher.body, 0
def short(self, *inputs):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return body(self, *inputs)
Teacher.body = short
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_all(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = together(2, tmp_path / "run", settings(teacher_folder, text_file, tmp_path / "c"))
    (tmp_path / "short.py").write_text(SHORT)
    where = run.command.index("stillroom")
    run.command[where - 1 : where + 1] = [str(tmp_path / "short.py")]
    fails(run, "ran out of memory with 4 sequences a batch in a process of 2")


def _begun(run: Any, shards: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(run.begun()) < shards:
        assert process.poll() is None, (run.log.parent / "out.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_death_ends_the_group_and_a_rerun_goes_on(
    victim: str, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = settings(teacher_folder, text_file, tmp_path / "c", sequences_per_shard=1)
    run = together(2, tmp_path / "run", given)
    process = run.start()
    try:
        _begun(run, 6, process)  # then three are committed at least
        leader = run.begun()[0][0]
        both = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        others = [int(one) for one in both if int(one) != leader]
        os.kill(leader if victim == "leader" else others[0], signal.SIGKILL)
        assert process.wait(120) != 0
    finally:
        runs.end(process)
    made = runs.records(tmp_path / "c")
    assert 0 < made < 19
    run.to_end()
    assert len(run.begun()) <= 19 + 3  # in hand: a shard at the teacher, one that waits, one that is written
    build_cache(CacheConfig(**{**given, "out": tmp_path / "alone"}))
    assert_near(open_cache(tmp_path / "c"), open_cache(tmp_path / "alone"))


@pytest.mark.slow
def test_torchrun_restarts_a_group(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = settings(teacher_folder, text_file, tmp_path / "c", sequences_per_shard=1)
    run = together(2, tmp_path / "run", given, restarts=3)
    process = run.start()
    try:
        _begun(run, 3, process)
        os.kill(run.begun()[0][0], signal.SIGKILL)
        assert process.wait(200) == 0, (run.log.parent / "out.txt").read_text()[-3000:]
    finally:
        runs.end(process)
    assert len({pid for pid, _ in run.begun()}) == 2
    assert not verify(tmp_path / "c", hashes=True).findings


@pytest.mark.slow
def test_sigterm_finishes_the_shard_in_hand(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = settings(teacher_folder, text_file, tmp_path / "c", sequences_per_shard=1)
    run = together(2, tmp_path / "run", given)
    process = run.start()
    try:
        _begun(run, 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) != 0
    finally:
        runs.end(process)
    said = (tmp_path / "run" / "out.txt").read_text()
    assert said.count("what was committed is kept") == 1
    assert runs.records(tmp_path / "c") == len({shard for _, shard in run.begun()}) < 19
    run.to_end()
    assert not verify(tmp_path / "c", hashes=True).findings


if __name__ == "__main__":
    program(Path(sys.argv[1]))
