"""Models, tokenizers and text small enough to make in a second; nothing is fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before any import of one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "the still room keeps what the fire gave and gives it again to all who ask for a little more of it".split()  # noqa: SIM905


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(2)


def make_text(documents: int, seed: int = 0) -> list[str]:
    """Deterministic documents of 20 to 60 words."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(20, 60))) + "." for _ in range(documents)]


def make_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """A byte-level BPE tokenizer saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_text(50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def llama_config(vocab_size: int = 300, **changes: Any) -> Any:
    """Configuration of a Llama with two layers of width 32."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (V = 300) with its tokenizer, as `save_pretrained` writes them."""
    import torch
    from transformers import LlamaForCausalLM

    folder = make_tokenizer(tmp_path_factory.mktemp("teacher"))
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration (no weights) of a one-layer student."""
    folder = tmp_path_factory.mktemp("student-config")
    llama_config(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl corpus of 60 documents."""
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(60, seed=1)))
    return file
