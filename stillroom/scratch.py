"""What an experiment needs and not everyone has: text, a tokenizer, a model's configuration, made from nothing but Python.

No torch here.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillroom.settings import unknown
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from stillroom.pipeline.config import CorpusConfig

HELD_OUT_SHARE: Final = 20  # one file in twenty
BYTES_PER_TOKEN: Final = 16  # more than any tokenizer makes of running text on average
OF_EVERY_CONFIG: Final = ("model_type", "architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def standard_library_text(folder: Path) -> tuple[Path, Path]:
    """Write the standard library's sources as two .jsonl files, train and held-out, split by file name.

    Returns:
        The paths of the training file and of the held-out file.

    Raises:
        InputError: this Python comes without its sources.
    """
    train, held_out = folder / "train.jsonl", folder / "heldout.jsonl"
    if train.is_file() and held_out.is_file():
        return train, held_out
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    lines: dict[Path, list[str]] = {train: [], held_out: []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if skipped & set(name.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few codec sources are in other encodings on purpose
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        target = held_out if digest[0] % HELD_OUT_SHARE == 0 else train
        lines[target].append(json.dumps({"path": name.as_posix(), "text": text}))
    if not lines[train] or not lines[held_out]:
        raise InputError(
            f"{root} holds no Python sources: run the demo with a Python that ships its library as .py files"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in lines.items():
        path.write_text("\n".join(content) + "\n", encoding="utf-8")
    return train, held_out


def split_text(corpus: CorpusConfig, share: float, folder: Path, tokens: int | None) -> tuple[Path, Path]:
    """Deal the documents of a corpus to two .jsonl files, train and held-out, by a hash of what they say.

    A document that occurs twice is in one of them only. Files of the same corpus, cut the same way, are found again.

    Args:
        corpus: text, or token ids.
        share: of the documents, held out.
        folder: where the files go.
        tokens: as many are to be trained on; reading stops at `BYTES_PER_TOKEN` bytes for each. None: everything is read.

    Returns:
        The paths of the training file and of the held-out file.

    Raises:
        InputError: a corpus that can not be read, or one whose documents all fall to one of the files.
    """
    from stillroom.pipeline.corpus import documents

    train, held_out, made = folder / "train.jsonl", folder / "heldout.jsonl", folder / "split.json"
    chosen = corpus.model_dump(mode="json", exclude={"seq_len", "max_sequences", "packing", "tokenize_workers"})
    enough = None if tokens is None else tokens * BYTES_PER_TOKEN
    record = {**chosen, "held_out_share": share, "enough_bytes": enough}
    if made.is_file() and json.loads(made.read_text()) == record:
        return train, held_out
    made.unlink(missing_ok=True)  # of other text: whoever read that one tells them apart by what they say
    folder.mkdir(parents=True, exist_ok=True)
    counts, size_bytes = {train: 0, held_out: 0}, 0
    column = corpus.ids_column or corpus.text_column
    with train.open("w", encoding="utf-8") as first, held_out.open("w", encoding="utf-8") as second:
        for document in documents(corpus):
            line = json.dumps({column: document})
            place = int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big") / 2**64
            path, file = (held_out, second) if place < share else (train, first)
            counts[path] += 1
            file.write(line + "\n")
            size_bytes += len(line) if path == train else 0
            if enough is not None and size_bytes >= enough:
                break
    for path, count in counts.items():
        if not count:
            raise InputError(
                f"none of the {sum(counts.values())} documents of {corpus.data} fell to {path.stem}: give --held-out of its own, "
                f"or another --held-out-share than {share}"
            )
    made.write_text(json.dumps(record, indent=1) + "\n")  # last: the split counts when it is whole
    return train, held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE tokenizer of `vocab_size` ids from `texts`, with `<eos>` as id 0, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_model_config(folder: Path, settings: Mapping[str, Any], *, role: str) -> Path:
    """Write a model's configuration (no weights) as `config.json`; returns `folder`.

    Args:
        folder: made if it is not there.
        settings: `model_type` and what differs from that type's own defaults.
        role: whose model, for the error.

    Raises:
        InputError: a type or a setting that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        raise InputError(f"{role}: " + unknown(f"{kind}", known, "model_type of transformers"))
    type_ = CONFIG_MAPPING[kind]
    names = {*vars(type_()), *type_.attribute_map, *OF_EVERY_CONFIG}
    for name in settings:
        if name not in names:
            raise InputError(f"{role}: " + unknown(name, sorted(names), f"setting of a {kind} model"))
    try:
        config = type_(**{name: value for name, value in settings.items() if name != "model_type"})
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{role} has a configuration that transformers refuses ({reason}): change it") from error
    config.save_pretrained(folder)
    return folder
