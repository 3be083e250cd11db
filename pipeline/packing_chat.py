"""A conversation to token ids through the tokenizer's chat template, with the tokens the assistant wrote marked.

Where the template has generation marks, they say which tokens those are. Where it has none, the text of the conversation up to
a turn is rendered with and without that turn: what the turn adds behind the prompt for it is the assistant's. That this
is so is checked for every turn; a template that renders earlier turns otherwise in context is refused.

Shapes: `N` tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(Exception):
    """One conversation that can not be rendered or masked."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Token ids, and which of them the assistant wrote (its end-of-turn marks among them)."""

    ids_N: npt.NDArray[np.uint32]
    mask_N: npt.NDArray[np.bool_]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> Chat:
    """Ids and mask of one conversation.

    Args:
        tokenizer: one with a chat template.
        messages: dicts with `role` and `content`, and whatever else the template knows.

    Raises:
        ChatError: the template refuses it, or does not say which part of it is the assistant's.
    """
    from jinja2 import TemplateError

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        if _MARK.search(tokenizer.get_chat_template()):
            found: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Chat(np.asarray(found["input_ids"], np.uint32), np.asarray(found["assistant_masks"], np.bool_))
        return _by_difference(tokenizer, messages)
    except (TemplateError, TypeError, KeyError, ValueError, IndexError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ChatError(
            f"a conversation does not go through the chat template ({reason}): mend or remove it"
        ) from error


def _by_difference(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> Chat:
    text = _render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(tokenizer, messages[:index], add_generation_prompt=True) if index else ""
            upto = _render(tokenizer, messages[: index + 1])
            if not (upto.startswith(prompt) and text.startswith(upto)):
                raise ChatError(
                    f"the chat template renders message {index} otherwise inside a conversation than at its end, so the "
                    "assistant's part can not be told: give it generation marks, or cut the conversation after that turn"
                )
            spans.append((len(prompt), len(upto)))
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets_N2 = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    mask_N = np.zeros(len(offsets_N2), np.bool_)
    for start, stop in spans:  # a token that begins in the prompt is the prompt's
        mask_N |= (offsets_N2[:, 0] >= start) & (offsets_N2[:, 0] < stop)
    return Chat(np.asarray(encoded["input_ids"], np.uint32), mask_N)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
