"""Conversations: the loss mask of every template, what it costs, and templates that can not be masked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import stillroom
from stillroom.cli import main
from stillroom.pipeline.config import CacheConfig, CorpusConfig
from stillroom.pipeline.packing import pack
from stillroom.pipeline.packing_chat import encode_chat
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.teacher import load_tokenizer
from stillroom.storage.errors import InputError
from stillroom.storage.verify import verify
from stillroom.train.data import CacheDataset
from stillroom.train.evaluate import evaluate

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>\n{% endgeneration %}{% else %}{{ m.content }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops what the assistant thought, but in the last turn: what reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('/')[-1] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "keep the fire low"},
    {"role": "user", "content": "what does the still room keep"},
    {"role": "assistant", "content": "what the fire gave"},
    {"role": "user", "content": "and who may ask for more of it"},
    {"role": "assistant", "content": "all who ask again for a little more"},
]


@pytest.fixture
def tokenizer(teacher_folder: Path) -> Any:
    return load_tokenizer(str(teacher_folder))


def _learnt(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> str:
    tokenizer.chat_template = template
    chat = encode_chat(tokenizer, messages)
    assert tokenizer.decode(chat.ids_N) == tokenizer.apply_chat_template(messages, tokenize=False)
    return str(tokenizer.decode(chat.ids_N[chat.mask_N]))


def test_both_ways_find_just_what_the_assistant_wrote(tokenizer: Any) -> None:
    wrote = "what the fire gave<eos>\nall who ask again for a little more<eos>\n"
    assert _learnt(tokenizer, PLAIN, CHAT) == wrote
    assert _learnt(tokenizer, MARKED, CHAT) == wrote
    tricky = [{"role": "user", "content": "say <|assistant|>yes<eos>"}, {"role": "assistant", "content": "no"}]
    assert _learnt(tokenizer, PLAIN, tricky) == "no<eos>\n"


def _corpus(file: Path, chats: list[Any]) -> Path:
    file.write_text("".join(json.dumps({"messages": chat, "text": "x"}) + "\n" for chat in chats))
    return file


def test_rows_are_those_whose_label_the_assistant_wrote(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = PLAIN
    chats = [CHAT, CHAT[:3], CHAT[1:2], CHAT]
    config = CorpusConfig(data=str(_corpus(tmp_path / "c.jsonl", chats)), messages_column="messages", seq_len=8)
    packed = pack(config, tokenizer)
    found = [encode_chat(tokenizer, chat) for chat in chats]
    ids, mask = (np.concatenate([getattr(chat, name) for chat in found]) for name in ("ids_N", "mask_N"))
    rows = len(packed.tokens_SL1) * 8
    np.testing.assert_array_equal(packed.tokens_SL1[:, 1:].ravel(), ids[1 : rows + 1])
    assert packed.mask_SL is not None
    np.testing.assert_array_equal(packed.mask_SL.ravel(), mask[1 : rows + 1])
    pq.write_table(
        pa.table({"messages": [[m | {"tool": None} for m in chat] for chat in chats]}), tmp_path / "c.parquet"
    )
    assert (
        pack(config.model_copy(update={"data": str(tmp_path / "c.parquet")}), tokenizer).fingerprint
        == packed.fingerprint
    )
    tokenizer.chat_template = MARKED.replace("<eos>\n{% endgeneration %}", "{% endgeneration %}<eos>\n")
    assert pack(config, tokenizer).fingerprint != packed.fingerprint  # the same text, another mask


def test_what_can_not_be_masked_is_refused_or_skipped(tokenizer: Any, tmp_path: Path) -> None:
    def packed(template: str | None, chats: list[Any], **settings: Any) -> Any:
        tokenizer.chat_template = template
        file = _corpus(tmp_path / "c.jsonl", chats)
        return pack(CorpusConfig(data=str(file), messages_column="messages", seq_len=8, **settings), tokenizer)

    thinks = [CHAT[1], {"role": "assistant", "content": "hm/yes"}, CHAT[3], {"role": "assistant", "content": "no"}]
    with pytest.raises(InputError, match="no chat template, which --messages-column needs"):
        packed(None, [CHAT])
    with pytest.raises(InputError, match=r"renders message 1 otherwise .*generation marks.*--skip-bad"):
        packed(FORGETFUL, [CHAT, thinks])
    with pytest.raises(InputError, match=r"does not go through the chat template \(roles must alternate\)"):
        packed("{{ raise_exception('roles must alternate') }}", [CHAT])
    with pytest.raises(InputError, match="no token of the assistant's"):
        packed(PLAIN, [CHAT[:2], CHAT[:2]])
    with pytest.raises(InputError, match=r"line 1 of .* no list of chat messages in 'messages'"):
        packed(PLAIN, ["text"])
    assert packed(FORGETFUL, [CHAT, thinks, thinks, CHAT], skip_bad=2).skipped == 2
    assert packed(FORGETFUL, [CHAT, thinks, thinks, CHAT], skip_bad=2).documents == 2
    with pytest.raises(InputError, match="1 before it were skipped"):
        packed(FORGETFUL, [CHAT, thinks, thinks, CHAT], skip_bad=1)


def _chat_teacher(folder: Path, teacher_folder: Path) -> Path:
    """The teacher, with a chat template beside its tokenizer."""
    shutil.copytree(teacher_folder, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_cache_keeps_assistant_rows_only(teacher_folder: Path, tmp_path: Path) -> None:
    """The teacher reads the prompts; the rows it keeps are those of a cache of the same text without a mask, bit for bit."""
    teacher = _chat_teacher(tmp_path / "teacher", teacher_folder)
    file = _corpus(tmp_path / "c.jsonl", [CHAT, CHAT[:3], CHAT] * 4)
    shared = {"teacher": str(teacher), "data": str(file), "seq_len": 32, "sequences_per_shard": 4}
    build_cache(CacheConfig(out=tmp_path / "chat", messages_column="messages", **shared))
    assert verify(tmp_path / "chat").sound
    chat = stillroom.open_cache(tmp_path / "chat")
    packed = pack(CorpusConfig(data=str(file), messages_column="messages", seq_len=32), load_tokenizer(str(teacher)))
    with (tmp_path / "ids.jsonl").open("w") as lines:
        lines.write(
            json.dumps({"text_ids": [*packed.tokens_SL1[:, :-1].ravel().tolist(), int(packed.tokens_SL1[-1, -1])]})
        )
    whole_config = {**shared, "data": str(tmp_path / "ids.jsonl"), "ids_column": "text_ids"}
    build_cache(CacheConfig(out=tmp_path / "whole", **whole_config))
    whole = stillroom.open_cache(tmp_path / "whole")
    assert packed.mask_SL is not None
    assert 0 < packed.mask_SL.mean() < 1
    for index in range(len(chat)):
        (tokens, some), (same, every) = chat[index], whole[index]
        np.testing.assert_array_equal(tokens, same)
        np.testing.assert_array_equal(np.diff(some.offsets) > 0, packed.mask_SL[index])
        kept_E = np.repeat(packed.mask_SL[index], np.diff(every.offsets))
        np.testing.assert_array_equal(some.ids, every.ids[kept_E])
        np.testing.assert_array_equal(some.weights, every.weights[kept_E])
        np.testing.assert_array_equal(np.isnan(some.label_logp), ~packed.mask_SL[index])
        np.testing.assert_array_equal(np.isnan(some.entropy), ~packed.mask_SL[index])
    measured = evaluate(teacher, cache=chat)
    said = chat.read(range(len(chat))).targets.label_logp
    assert measured.rows == packed.mask_SL.sum()
    assert measured.lm_loss == pytest.approx(-np.nanmean(said), abs=1 / 256 + 1e-4)


@pytest.mark.parametrize("with_targets", [True, False])
def test_the_student_learns_the_assistants_rows_only(teacher_folder: Path, tmp_path: Path, with_targets: bool) -> None:
    teacher = _chat_teacher(tmp_path / "teacher", teacher_folder)
    file = _corpus(tmp_path / "c.jsonl", [CHAT] * 4)
    config = CacheConfig(
        teacher=str(teacher), data=str(file), out=tmp_path / "c", messages_column="messages", seq_len=32
    )
    build_cache(config)
    cache = stillroom.open_cache(tmp_path / "c", columns=("tokens",))
    mask_SL = pack(config, load_tokenizer(str(teacher))).mask_SL
    batch = CacheDataset(cache, with_targets=with_targets).__getitems__([0, 1])
    np.testing.assert_array_equal(batch.mask_BL, mask_SL[:2])
    np.testing.assert_array_equal(batch.labels_BL == -100, ~mask_SL[:2])


def test_a_teacher_without_template_is_one_sentence(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _corpus(tmp_path / "c.jsonl", [CHAT])
    words = ["--teacher", str(teacher_folder), "--data", str(file), "--out", str(tmp_path / "c"), "--seq-len", "8"]
    assert main(["cache", *words, "--messages-column", "messages"]) == 2
    assert "has no chat template" in capsys.readouterr().err.splitlines()[-1]
