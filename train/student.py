"""The student: found, checked, built, and given a tokenizer. Nothing here writes before the run folder exists.

Shapes: `V` vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from stillroom.kernels.apart import mixing
from stillroom.storage.errors import InputError

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
WEIGHT_PATTERNS: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A causal language model that has been found, not loaded.

    Attributes:
        name: as the user gave it.
        config: its configuration.
        has_weights: False for a configuration alone.
    """

    name: str
    config: PretrainedConfig
    has_weights: bool

    @property
    def vocab_size(self) -> int:
        """Width V of its logits."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int | None:
        """Longest sequence its configuration allows, if it says."""
        length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None


def find_model(name: str, *, role: str) -> ModelInfo:
    """Read the configuration of a model.

    Args:
        name: folder with or without weights, `.json` file with a configuration, or hub id.
        role: "student" or "teacher", for the error.

    Raises:
        InputError: no such model, no usable configuration, or not a causal language model.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{role} {name} is a folder without config.json: give one that `save_pretrained` wrote")
    if not path.exists() and (name.startswith(("/", ".", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise InputError(f"{role} {name} does not exist: give a folder, a .json configuration or a hub id")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{role} {name} has no configuration that transformers can read ({reason})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{role} {name} is a {config.model_type} model, wanted a causal language model: give another")
    has_weights = path.is_dir() and any(any(path.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    return ModelInfo(str(path) if path.exists() else name, config, has_weights or not path.exists())


def check_length(model: ModelInfo, seq_len: int, *, role: str) -> None:
    """Refuse sequences the model has no positions for.

    Raises:
        InputError: `seq_len` is above the configuration's `max_position_embeddings`.
    """
    if model.max_length is not None and seq_len > model.max_length:
        raise InputError(
            f"sequences have {seq_len} positions but {role} {model.name} ends at {model.max_length} "
            "(max_position_embeddings): use shorter sequences or another model"
        )


def check_documents(loaded: torch.nn.Module, model: ModelInfo, *, role: str) -> None:
    """Refuse a model that can not read packed documents apart.

    Raises:
        InputError: naming what it does instead.
    """
    training, weight = loaded.training, next(loaded.parameters())

    def logits(tokens_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = loaded(input_ids=tokens_BL, position_ids=positions_BL, use_cache=False).logits
        return found

    loaded.eval()
    wrong = mixing(logits, vocab_size=model.vocab_size, dtype=weight.dtype, device=weight.device)
    loaded.train(training)
    if wrong is not None:
        raise InputError(
            f"{role} {model.name} ({model.config.model_type}) does not read packed documents apart ({wrong}), and the cache was "
            "made so: give another model, or a cache with packing concat"
        )


def load_model(model: ModelInfo, *, role: str, seed: int = 0) -> PreTrainedModel:
    """The model in float32: its weights, or random ones from `seed` where there is only a configuration.

    Raises:
        InputError: weights that cannot be read, or not all there.
    """
    with quiet():
        if not model.has_weights:
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                model.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{role} {model.name} has weights that cannot be loaded ({reason})") from error
    if absent := sorted(report["missing_keys"]):  # the library fills them with random numbers and a log line
        raise InputError(
            f"{role} {model.name} lacks {len(absent)} of its weights ({absent[0]} first): give a whole checkpoint"
        )
    return loaded


def find_tokenizer(*folders: Path | None) -> Path | None:
    """The first of the folders that holds a tokenizer."""
    for folder in folders:
        if folder is not None and any(_plain(folder / f) for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return folder
    return None


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer files of one folder to another; links are left, they may point anywhere."""
    for name in TOKENIZER_FILES:
        if _plain(source / name):
            shutil.copyfile(source / name, out / name)


def check_tokenizers(first: Path | None, second: Path | None, *, roles: tuple[str, str]) -> None:
    """Refuse two tokenizers that number tokens differently; says nothing where either is not at hand.

    Raises:
        InputError: the two `tokenizer.json` map text to different ids.
    """
    if first is None or second is None or not all(_plain(f / "tokenizer.json") for f in (first, second)):
        return
    if _token_ids(first) != _token_ids(second):
        raise InputError(
            f"the tokenizer of the {roles[0]} ({first}) numbers tokens differently from that of the {roles[1]} ({second}): "
            "distillation needs one vocabulary"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the model library's bars and notices off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _token_ids(folder: Path) -> dict[str, Any]:
    """What decides the ids: the vocabulary and the added tokens."""
    parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {t["content"]: t["id"] for t in parsed.get("added_tokens", [])}
    return {"model": parsed["model"].get("vocab"), "added": added}
