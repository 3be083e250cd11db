"""What all arms of a comparison stand on: text, tokenizer, teacher, student, draws that were to be solved for.

Shapes: `S` sequences, `L1` = L + 1 token ids of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.comparing.arms import Arm, TeacherToTrain, naming
from stillroom.comparing.config import CompareConfig
from stillroom.comparing.sources import check_models, model_of, texts, tokenizer_source
from stillroom.console import Reporter
from stillroom.storage.errors import NotACacheError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from stillroom.pipeline.config import CacheConfig
    from stillroom.pipeline.packing import PackedCorpus
    from stillroom.storage.cache import Cache
    from stillroom.storage.spec import SamplerSpec


@dataclass(frozen=True, slots=True)
class Ground:
    """What all arms have in common.

    Attributes:
        text: what caches and students read.
        teacher, student: folder or hub id.
        teacher_words, student_words: what they are, in words.
        packed: the training text.
        held_SL1: `[S, L+1]` token ids of the held-out text; `held_fingerprint` is their hash.
        fingerprint: of the teacher.
        draws: by arm, where they were to be solved for.
    """

    text: str
    teacher: str
    student: str
    teacher_words: str
    student_words: str
    packed: PackedCorpus
    held_SL1: npt.NDArray[np.uint32]
    held_fingerprint: str
    fingerprint: str
    draws: dict[str, int]

    def caching(self, config: CompareConfig, arm: Arm) -> tuple[CacheConfig, Path]:
        """Settings of an arm's cache, draws solved, and its folder, which arms of equal samplers share."""
        solved: dict[str, Any] = {}
        if arm.name in self.draws:
            solved = {"draws": self.draws[arm.name], "entries_per_row": None}
        made = config.caching(arm, corpus=self.text, teacher=self.teacher, out=Path("unnamed"), **solved)
        spec = made.sampler_spec()
        parts = [spec.kind, str(spec.draws), spec.keep_logp]
        parts += [f"{name}{getattr(spec, name):g}" for name in ("exponent", "top_p") if getattr(spec, name) != 1.0]
        parts += [f"seed{spec.seed}"] if spec.seed else []
        folder = config.out / "caches" / "-".join(parts)
        return made.model_copy(update={"out": folder}), folder

    def is_complete(self, folder: Path, spec: SamplerSpec) -> bool:
        """Whether the whole cache is there, of this teacher, text and sampler."""
        try:
            made = self.open(folder, partial=True)
        except NotACacheError:
            return False
        manifest = made.manifest
        return (
            len(made) == manifest.sequences
            and manifest.sampler == spec
            and manifest.corpus.fingerprint == self.packed.fingerprint
            and manifest.teacher.fingerprint == self.fingerprint
        )

    def open(self, folder: Path, *, partial: bool = False) -> Cache:
        """A cache of the comparison."""
        from stillroom.storage.cache import open_cache

        return open_cache(folder, partial=partial)

    def evaluation_key(self) -> dict[str, Any]:
        """What a student's figures depend on beside the student."""
        return {"held_out": self.held_fingerprint, "teacher": self.fingerprint}


def lay_ground(config: CompareConfig, report: Reporter) -> Ground:
    """Make or find everything but caches and students.

    Raises:
        InputError: text or models that can not be used, or entries per row that no number of draws keeps, naming the arm.
    """
    from stillroom.pipeline.packing import pack
    from stillroom.pipeline.teacher import load_tokenizer
    from stillroom.train.student import find_model

    train_text, held_text = texts(config)
    source = tokenizer_source(config, train_text)
    tokenizer = load_tokenizer(source)
    to_train = isinstance(config.teacher, TeacherToTrain)
    model = model_of(config, config.teacher.train if isinstance(config.teacher, TeacherToTrain) else config.teacher,
                   "teacher", len(tokenizer), tokenizer)  # fmt: skip
    student = model_of(config, config.student, "student", find_model(model, role="teacher").vocab_size, tokenizer)
    words = check_models(config, model, student)

    packed = pack(config.corpus(train_text, config.sequences), tokenizer, on_progress=_counting(report, "pack"))
    held = pack(config.corpus(held_text, config.held_out_sequences), tokenizer)
    teacher = _train_teacher(config, model, tokenizer, train_text, packed, report) if to_train else model
    fingerprint, draws = _measure(config, teacher, train_text, packed)
    return Ground(
        text=train_text,
        teacher=teacher,
        student=student,
        teacher_words=words[0] + (", trained on the text" if to_train else ""),
        student_words=words[1],
        packed=packed,
        held_SL1=held.tokens_SL1,
        held_fingerprint=held.fingerprint,
        fingerprint=fingerprint,
        draws=draws,
    )


def _train_teacher(
    config: CompareConfig,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    packed: PackedCorpus,
    report: Reporter,
) -> str:
    """The teacher's folder; it is trained afterwards."""
    from stillroom.pipeline.packing import pack
    from stillroom.train.run import train_student

    assert isinstance(config.teacher, TeacherToTrain)
    tokens_SL1, out = packed.tokens_SL1, config.out / "teacher"
    if config.teacher.tokens is not None:
        tokens_SL1 = pack(config.corpus(text, max(1, config.teacher.tokens // config.seq_len)), tokenizer).tokens_SL1
    train_student(
        config.teacher_training(model, out),
        tokens_SL1=tokens_SL1,
        on_progress=lambda done, total, metrics: report(
            "teacher", done, total, f"loss {metrics['loss']:.3f}" if metrics else ""
        ),
    )
    report.close("teacher")
    tokenizer.save_pretrained(out)
    return str(out)


def _measure(config: CompareConfig, name: str, text: str, packed: PackedCorpus) -> tuple[str, dict[str, int]]:
    """The teacher's fingerprint, and the draws of arms that say how many entries a row is to keep; it is let go again."""
    from stillroom.pipeline.budget import solve_draws
    from stillroom.pipeline.config import TeacherConfig
    from stillroom.pipeline.probe import probe
    from stillroom.pipeline.teacher import Teacher

    cached = {
        arm.name: config.caching(arm, corpus=text, teacher=name, out=Path("unnamed"))
        for arm in config.arms
        if arm.cache is not None
    }
    own = {key: value for key, value in config.cache.items() if key in TeacherConfig.model_fields}
    teacher = Teacher(TeacherConfig(**{**own, "teacher": name}))
    draws: dict[str, int] = {}
    wanted = [
        arm for arm in config.arms if arm.entries_like or (arm.name in cached and cached[arm.name].entries_per_row)
    ]
    if not wanted:
        return teacher.fingerprint, draws
    rows = probe(teacher, packed, batch_size=max(made.batch_size for made in cached.values()))
    for arm in sorted(wanted, key=lambda arm: arm.entries_like is not None):  # models before those that follow them
        made = cached[arm.name]
        entries = made.entries_per_row
        if arm.entries_like is not None:
            model = cached[arm.entries_like].sampler_spec()
            model = replace(model, draws=draws.get(arm.entries_like, model.draws))
            entries = rows.sample(model).entries / rows.rows
        assert entries is not None
        with naming(f"arm {arm.name}"):
            draws[arm.name] = solve_draws(rows, made.sampler_spec(), entries)
    return teacher.fingerprint, draws


def _counting(report: Reporter, stage: str) -> Any:
    return lambda done: report(stage, done, 0)
