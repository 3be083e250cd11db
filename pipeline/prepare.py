"""Before the first shard: open teacher and corpus once, settle the plan, put the manifest.

Shapes: `S` sequences, `L` rows of a sequence.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillroom.pipeline.budget import settled_spec
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.packing import PackedCorpus, pack, tokenizer_fingerprint
from stillroom.pipeline.teacher import Teacher, load_tokenizer
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

if TYPE_CHECKING:
    from stillroom.pipeline.group import Group

LIBRARIES: Final = ("stillroom", "torch", "transformers", "tokenizers", "numpy")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A settled run: with it any process can make any shard. It can be pickled; a loaded teacher is left behind.

    Attributes:
        config: as given.
        manifest: what the cache is: the plan of shards is in it.
        corpus: the packed tokens.
    """

    config: CacheConfig
    manifest: Manifest
    corpus: PackedCorpus
    _teacher: list[Teacher] = field(default_factory=list, repr=False, compare=False)

    @property
    def spec(self) -> SamplerSpec:
        """How the teacher's distribution is thinned."""
        return self.manifest.sampler

    def teacher(self) -> Teacher:
        """The teacher, loaded in this process the first time it is asked for.

        Raises:
            InputError: it can not be loaded, or is not the one of the plan.
        """
        if not self._teacher:
            teacher = Teacher(self.config)
            if teacher.fingerprint != self.manifest.teacher.fingerprint:
                raise InputError(
                    f"teacher {teacher.name} has fingerprint {teacher.fingerprint[:12]} in this process, the plan was made "
                    f"with {self.manifest.teacher.fingerprint[:12]}: use the same weights and --dtype everywhere"
                )
            self._teacher.append(teacher)
        return self._teacher[0]

    def writer(self) -> CacheWriter:
        """A writer on the cache.

        Raises:
            PlanMismatchError: the place belongs to another run.
        """
        return CacheWriter(self.config.out, self.manifest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_teacher": []}


def prepare(
    config: CacheConfig, on_progress: Progress = lambda stage, done, total: None, group: Group | None = None
) -> Prepared:
    """Load teacher and tokenizer, pack the corpus, and put manifest and tokenizer into the cache.

    Args:
        config: teacher, corpus, sampler, directory.
        on_progress: told (stage, done, total): stage `pack` counts documents (total 0: unknown).
        group: the processes that hold the teacher together; the others load it at the same time.

    Raises:
        InputError: a teacher or corpus that can not be used.
        PlanMismatchError: the directory belongs to another run.
    """
    config.sampler_spec()  # before anything is loaded: its complaints
    tokenizer = load_tokenizer(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    teacher = Teacher(config, group)
    _check_fit(config, teacher, tokenizer)
    corpus = pack(config, tokenizer, on_progress=lambda done: on_progress("pack", done, 0))
    spec = settled_spec(config, teacher, corpus)
    prepared = Prepared(config, _manifest(config, spec, teacher, tokenizer, corpus), corpus, [teacher])
    writer = prepared.writer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        writer.add_folder("tokenizer", Path(folder))
    return prepared


def _check_fit(config: CacheConfig, teacher: Teacher, tokenizer: Any) -> None:
    if len(tokenizer) > teacher.vocab_size:
        raise InputError(
            f"the tokenizer of {config.teacher} has {len(tokenizer)} ids, its model's vocabulary {teacher.vocab_size}: "
            "give the teacher the tokenizer it was trained with"
        )
    if config.packing == "documents":
        teacher.check_documents()
    if teacher.max_length is not None and config.seq_len > teacher.max_length:
        raise InputError(
            f"seq_len came as {config.seq_len}, the teacher reads at most {teacher.max_length} positions: lower --seq-len"
        )


def _manifest(
    config: CacheConfig, spec: SamplerSpec, teacher: Teacher, tokenizer: Any, corpus: PackedCorpus
) -> Manifest:
    return Manifest(
        teacher=TeacherInfo(
            name=teacher.name,
            revision=teacher.revision,
            fingerprint=teacher.fingerprint,
            vocab_size=teacher.vocab_size,
            dtype=str(teacher.dtype).removeprefix("torch."),
        ),
        tokenizer=TokenizerInfo(fingerprint=tokenizer_fingerprint(tokenizer), vocab_size=len(tokenizer)),
        corpus=CorpusInfo(
            name=config.data,
            fingerprint=corpus.fingerprint,
            documents=corpus.documents,
            tokens=int(corpus.tokens_SL1.shape[0]) * config.seq_len + 1,
        ),
        packing=PackingInfo(policy=config.packing, seq_len=config.seq_len),
        sampler=spec,
        vocab_size=teacher.vocab_size,
        sequences=len(corpus.tokens_SL1),
        sequences_per_shard=config.sequences_per_shard,
        libraries={name: version(name) for name in LIBRARIES},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
