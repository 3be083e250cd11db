"""What a comparison is made from: its texts, its tokenizer, its models; found, or made, and checked before one is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stillroom.comparing.arms import TeacherToTrain
from stillroom.comparing.config import PYTHON_SOURCES, CompareConfig
from stillroom.scratch import split_text, standard_library_text, train_tokenizer, write_model_config
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def texts(config: CompareConfig) -> tuple[str, str]:
    """Training and held-out text, as sources of a corpus."""
    if config.data == PYTHON_SOURCES:
        train, held_out = standard_library_text(config.out / "text")
        return str(train), config.held_out or str(held_out)
    if config.held_out is not None:
        return config.data, config.held_out
    needed = [None if config.sequences is None else config.sequences * config.seq_len]
    if isinstance(config.teacher, TeacherToTrain) and config.teacher.tokens is not None:
        needed.append(config.teacher.tokens)
    tokens = None if None in needed else max(count for count in needed if count is not None)
    train, held_out = split_text(config.corpus(config.data, None), config.held_out_share, config.out / "text", tokens)
    return str(train), str(held_out)


def tokenizer_source(config: CompareConfig, text: str) -> str:
    """Folder or hub id of the tokenizer; one that was to be made is there afterwards."""
    teacher = config.teacher
    if isinstance(teacher, str):
        return teacher
    if isinstance(teacher.tokenizer, int):
        folder = config.out / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            train_tokenizer(_plaintexts(config, text), teacher.tokenizer, folder)
        return str(folder)
    if teacher.tokenizer is None and isinstance(teacher.train, dict):
        raise InputError("teacher.tokenizer is missing: name a folder or hub id, or how many ids one is to have")
    return teacher.tokenizer or str(teacher.train)


def _plaintexts(config: CompareConfig, text: str) -> Iterator[str]:
    from stillroom.pipeline.corpus import documents

    if config.ids_column is not None:
        raise InputError("a tokenizer can not be made from token ids: name the one that made them (teacher.tokenizer)")
    for document in documents(config.corpus(text, None)):
        yield str(document)


def model_of(
    config: CompareConfig, asked: str | dict[str, Any], role: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Folder or hub id of a model; a configuration given in the settings is written out, the tokenizer beside it."""
    if isinstance(asked, str):
        return asked
    folder = config.out / f"{role}-config"
    write_model_config(folder, {"vocab_size": vocab_size, **asked}, role=role)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check_models(config: CompareConfig, teacher: str, student: str) -> tuple[str, str]:
    """Refuse models that can not go together, before one is trained; what they are, in words."""
    from stillroom.train.student import check_length, find_model

    found = {role: find_model(name, role=role) for role, name in (("teacher", teacher), ("student", student))}
    for role, model in found.items():
        check_length(model, config.seq_len, role=role)
    if isinstance(config.teacher, str) and not found["teacher"].has_weights:
        raise InputError(
            f"teacher {teacher} has a configuration but no weights: give a trained model, or teacher: train:"
        )
    if found["student"].vocab_size < found["teacher"].vocab_size:
        raise InputError(
            f"student {student} has a vocabulary of {found['student'].vocab_size}, the teacher's is "
            f"{found['teacher'].vocab_size}: give a student with the teacher's tokenizer and at least its vocabulary"
        )
    words = []
    for model in found.values():
        settings = model.config.get_text_config()
        layers, width = getattr(settings, "num_hidden_layers", "?"), getattr(settings, "hidden_size", "?")
        words.append(f"{model.config.model_type}, {layers} layers of width {width}, {model.vocab_size:,} ids")
    return words[0], words[1]
