"""The demo: the whole way, once, on text every machine has, through the same functions the commands call.

Python's own sources -> tokenizer -> a small teacher -> cache -> one audit line -> three students -> a table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillroom.console import say, show_table
from stillroom.scratch import standard_library_text, train_tokenizer, write_model_config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stillroom.train.config import TrainConfig

VOCAB_SIZE: Final = 4096
SEQ_LEN: Final = 256
HELD_OUT_SEQUENCES: Final = 128
SAMPLER: Final = "threshold"
DRAWS: Final = 50
MATRIX_LR: Final = 0.02
EMBEDDING_LR: Final = 4e-3
ARMS: Final = {  # loss, whether the teacher is asked live, folder
    "labels only (CE)": ("ce", False, "student-ce"),
    "from the cache": ("forward_kl", False, "student-cache"),
    "live teacher (full KD)": ("forward_kl", True, "student-full-kd"),
}

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Numbers of one demo run.

    Attributes:
        bytes_per_row: of the cache, everything included.
        entries_per_row: mean support.
        audit: the audit line.
        arms: per arm the evaluation on held-out files, and training tokens per second.
        gap_closed: share of the CE -> full-KD gap of held-out KL that the cached student closed.
        seconds: wall time by stage of this run (a stage found finished costs nothing).
    """

    bytes_per_row: float
    entries_per_row: float
    audit: str
    arms: dict[str, dict[str, Any]]
    gap_closed: float
    seconds: dict[str, float]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: one row per arm."""
        table = []
        for name, arm in self.arms.items():
            numbers = [arm.get("lm_loss"), arm.get("kl"), arm.get("ece"), arm.get("acceptance")]
            cells = ["" if value is None else f"{value:.4f}" for value in numbers]
            size = f"{self.bytes_per_row:.1f}" if name == "from the cache" else ""
            closed = f"{self.gap_closed:.0%}" if name == "from the cache" else ""
            table.append((name, size, *cells, closed))
        return table

    def show(self) -> None:
        """Print the audit line and the table."""
        say(self.audit)
        show_table("held-out files of the standard library", HEADER, self.rows())


HEADER: Final = ("student", "bytes/row", "LM loss", "KL to teacher", "ECE", "acceptance", "KL gap closed")


def run_demo(out: Path, *, tokens: int, seed: int, report: Report) -> DemoResult:
    """Run every stage that is not finished yet, below `out`.

    Args:
        out: folder for text, models, cache and results.
        tokens: training tokens of the teacher and of each student.
        seed: initial weights, order, sampler.
        report: told (stage, done, total, note).
    """
    seconds: dict[str, float] = {}
    with _Timed(seconds, "text and tokenizer"):
        text, held_out = standard_library_text(out / "text")
        config, teacher = teacher_config(out, text), out / "teacher"
    from stillroom.pipeline.config import CacheConfig, CorpusConfig
    from stillroom.pipeline.packing import pack
    from stillroom.pipeline.run import build_cache
    from stillroom.pipeline.teacher import load_tokenizer
    from stillroom.storage.cache import open_cache
    from stillroom.train.run import train_student

    corpus = CorpusConfig(data=str(text), seq_len=SEQ_LEN, max_sequences=tokens // SEQ_LEN)
    tokenizer = load_tokenizer(str(config))
    with _Timed(seconds, "teacher"):
        packed = pack(corpus, tokenizer)
        train_student(
            training(student=str(config), out=teacher, loss="ce", seed=seed),
            tokens_SL1=packed.tokens_SL1,
            on_progress=_bar(report, "teacher"),
        )
        tokenizer.save_pretrained(teacher)
    with _Timed(seconds, "cache"):
        settings = CacheConfig(
            **corpus.model_dump(), teacher=str(teacher), out=out / "cache", sampler=SAMPLER, draws=DRAWS, seed=seed,
            sequences_per_shard=512,
        )  # fmt: skip
        build_cache(settings, on_progress=lambda stage, done, total: report(stage, done, total, ""))
    cache = open_cache(out / "cache")
    with _Timed(seconds, "audit"):
        audit = _audit(cache, teacher)
    say(audit)
    held_corpus = CorpusConfig(data=str(held_out), seq_len=SEQ_LEN, max_sequences=HELD_OUT_SEQUENCES)
    arms = _students(out, pack(held_corpus, tokenizer).tokens_SL1, seed, seconds, report)
    ce, cached, full = (arms[name]["kl"] for name in ARMS)
    arms["the teacher itself"] = {"lm_loss": arms["from the cache"]["teacher_lm_loss"]}
    rows = len(cache) * SEQ_LEN
    result = DemoResult(
        bytes_per_row=sum(cache.bytes_by_array().values()) / rows,
        entries_per_row=cache.entries / rows,
        audit=audit,
        arms=arms,
        gap_closed=(ce - cached) / (ce - full),
        seconds=seconds,
    )
    (out / "results.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def training(**settings: Any) -> TrainConfig:
    """Training settings of the demo's small models: Muon, because AdamW leaves so young a teacher behind its student."""
    from stillroom.train.config import TrainConfig

    return TrainConfig(
        optimizer="muon", lr=MATRIX_LR, embedding_lr=EMBEDDING_LR, batch_size=8, schedule="linear", **settings
    )


def _students(
    out: Path, held_SL1: npt.NDArray[np.uint32], seed: int, seconds: dict[str, float], report: Report
) -> dict[str, dict[str, Any]]:
    """Train and measure the student of every arm."""
    from stillroom.train.evaluate import evaluate
    from stillroom.train.run import train_student

    student, teacher = model_config(out / "student-config", layers=2, hidden=128), out / "teacher"
    arms = {}
    for name, (loss, live, folder) in ARMS.items():
        with _Timed(seconds, name):
            config = training(
                cache=out / "cache", student=str(student), out=out / folder, loss=loss, seed=seed,
                teacher=str(teacher) if live else None,
            )  # fmt: skip
            trained = train_student(config, on_progress=_bar(report, name))
        with _Timed(seconds, "evaluation"):
            measured = evaluate(
                out / folder, tokens_SL1=held_SL1, teacher=teacher, on_progress=_bar(report, f"evaluate: {name}")
            )
        arms[name] = {**asdict(measured), "tokens_per_s": trained.tokens_per_s}
    return arms


def teacher_config(out: Path, text: Path) -> Path:
    """Folder with the teacher's configuration and a tokenizer trained on the training file."""
    folder = model_config(out / "teacher-config", layers=4, hidden=256)
    if not (folder / "tokenizer.json").is_file():
        with text.open(encoding="utf-8") as lines:
            train_tokenizer((json.loads(line)["text"] for line in lines), VOCAB_SIZE, folder)
    return folder


def model_config(folder: Path, *, layers: int, hidden: int) -> Path:
    """Folder with the configuration (no weights) of a small Llama-style model."""
    heads = max(2, hidden // 64)
    settings = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return write_model_config(folder, settings, role="demo")


def _audit(cache: Any, teacher: Path) -> str:
    from stillroom.pipeline.audit import audit_line
    from stillroom.pipeline.config import TeacherConfig
    from stillroom.pipeline.teacher import Teacher

    return str(audit_line(cache, Teacher(TeacherConfig(teacher=str(teacher)))))


def _bar(report: Report, stage: str) -> Callable[..., None]:
    """`report` as the rooms call it: (done, total) or (done, total, metrics)."""

    def show(done: int, total: int, metrics: dict[str, Any] | None = None) -> None:
        report(stage, done, total, f"loss {metrics['loss']:.3f}" if metrics else "")

    return show


class _Timed:
    """Adds the wall time of a `with` block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._start
