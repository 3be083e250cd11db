"""Teachers: padded vocabularies, scaled and capped logits, attention, device maps, adapters, and who they are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stillroom
from stillroom.cli import main
from stillroom.pipeline.audit import audit_line
from stillroom.pipeline.config import CacheConfig, TeacherConfig
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.teacher import Teacher
from stillroom.pipeline.teacher_identity import fingerprint
from stillroom.storage.errors import InputError, PlanMismatchError
from tests.conftest import llama_config, make_tokenizer

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 250


def _teacher(folder: Path, **settings: Any) -> Teacher:
    return Teacher(TeacherConfig(teacher=str(folder), **settings))


def _logits(folder: Path, **settings: Any) -> torch.Tensor:
    return torch.stack(list(_teacher(folder, **settings).logits(TOKENS)))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose logits have 84 columns more than its tokenizer has ids, by no means small."""
    from transformers import LlamaForCausalLM

    folder = make_tokenizer(tmp_path_factory.mktemp("padded"))
    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(384)).save_pretrained(folder)
    return folder


def test_columns_beyond_the_vocabulary_are_left_out(padded: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = dict(teacher=str(padded), data=str(text_file), seq_len=16, max_sequences=6)
    build_cache(CacheConfig(**settings, out=tmp_path / "c", vocab_size=300))
    cache = stillroom.open_cache(tmp_path / "c")
    assert cache.manifest.vocab_size == cache.manifest.teacher.vocab_size == 300
    item = cache[4]
    tokens_L1 = torch.from_numpy(item.tokens.astype(np.int64))
    with torch.no_grad():
        logits_LV = AutoModelForCausalLM.from_pretrained(padded)(input_ids=tokens_L1[None, :-1]).logits[0]
    label_L = logits_LV[:, :300].double().log_softmax(-1)[torch.arange(16), tokens_L1[1:]]
    np.testing.assert_allclose(item.targets.label_logp, label_L.numpy(), atol=0.01)
    assert item.targets.ids.max() < 300
    build_cache(CacheConfig(**settings, out=tmp_path / "d"))
    wide = stillroom.open_cache(tmp_path / "d")
    assert wide.manifest.vocab_size == 384
    assert max(wide[index].targets.ids.max() for index in range(6)) >= 300
    for size, words in ((385, "384 wide: lower --vocab-size"), (100, "the tokenizer .* its model's vocabulary 100")):
        with pytest.raises(InputError, match=words):
            build_cache(CacheConfig(**settings, out=tmp_path / "e", vocab_size=size))


def test_scaled_logits_are_taken_whole(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    settings = CohereConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, logit_scale=0.25, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = CohereForCausalLM(settings).eval()
    model.save_pretrained(tmp_path)
    assert not _teacher(tmp_path).chunked_head
    with torch.no_grad():
        own = model(input_ids=TOKENS).logits
    assert torch.equal(_logits(tmp_path), own)
    assert torch.equal(_logits(tmp_path, vocab_size=280), own[..., :280])


def test_a_head_that_is_no_plain_matrix_is_left_to_the_model(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quantised head is: a layer of its own kind, whose forward alone knows what its weight means."""
    from transformers import LlamaForCausalLM

    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight / 2)

    build = LlamaForCausalLM.__init__

    def with_other_head(self: Any, config: Any) -> None:
        build(self, config)
        self.lm_head = Halved(config.hidden_size, config.vocab_size, bias=False)

    plain = _logits(teacher_folder)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_other_head)
    assert not _teacher(teacher_folder).chunked_head
    torch.testing.assert_close(_logits(teacher_folder), plain / 2, rtol=1e-5, atol=1e-5)


def test_attention_and_device_map_reach_the_library(teacher_folder: Path) -> None:
    plain = _teacher(teacher_folder)
    for settings in ({"attn_implementation": "eager"}, {"device_map": "cpu"}):
        other = _teacher(teacher_folder, **settings)
        assert other.fingerprint == plain.fingerprint
        torch.testing.assert_close(_logits(teacher_folder, **settings), _logits(teacher_folder), rtol=1e-4, atol=1e-4)
    for settings in ({"attn_implementation": "nonsense"}, {"device_map": "nonsense"}):
        with pytest.raises(InputError, match="can not be loaded as a causal language model"):
            _teacher(teacher_folder, **settings)


def test_positions_keep_documents_apart(teacher_folder: Path) -> None:
    """With positions that start again, the second document is read as if it stood alone."""
    teacher = _teacher(teacher_folder)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    both = teacher.head(teacher.body(TOKENS[:1], positions)[0])
    alone = next(teacher.logits(TOKENS[:1, 12:]))
    torch.testing.assert_close(both[12:], alone, rtol=1e-4, atol=1e-4)
    assert (both[12:] - next(teacher.logits(TOKENS[:1]))[12:]).abs().max() > 0.01


def test_identity_is_the_weights_not_the_path(teacher_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_folder, tmp_path / "elsewhere")
    assert _teacher(tmp_path / "elsewhere").fingerprint == _teacher(teacher_folder).fingerprint


def _identity(model: nn.Module, config: Any) -> str:
    model.config = config
    return fingerprint(model)


def test_identity_is_the_configuration_too(tmp_path: Path) -> None:
    """What no tensor tells: the same weights with another rotary base are another teacher, under another path are not."""
    from transformers import LlamaForCausalLM

    names = []
    for name, base in (("a", 10_000.0), ("b", 10_000), ("c", 20_000.0)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(rope_parameters={"rope_type": "default", "rope_theta": base}))
        model.save_pretrained(make_tokenizer(tmp_path / name))
        names.append(_teacher(tmp_path / name).fingerprint)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_key_value_heads": 1}, {"attention_bias": True}, {"max_position_embeddings": 128},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ],
)  # fmt: skip
def test_every_setting_that_changes_logits_counts(change: dict[str, Any]) -> None:
    model = nn.Linear(2, 2)
    assert _identity(model, llama_config(**change)) != _identity(model, llama_config())


def test_windows_caps_and_scales_count() -> None:
    import transformers as hf

    model = nn.Linear(2, 2)
    gemma = [{}, {"final_logit_softcapping": 20.0}, {"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 128},
             {"sliding_window": 8}, {"layer_types": ["full_attention"] * 2}]  # fmt: skip
    told = [_identity(model, hf.Gemma2Config(num_hidden_layers=2, **changes)) for changes in gemma]
    told += [_identity(model, hf.MistralConfig(sliding_window=window)) for window in (None, 4096)]
    told += [_identity(model, hf.CohereConfig(logit_scale=scale)) for scale in (0.25, 0.0625)]
    assert len(set(told)) == len(told)


def test_settings_that_leave_logits_alone_do_not_count() -> None:
    """Nor does a field that a later version of the library adds, filled in with its default."""
    from transformers import LlamaConfig

    class LaterConfig(LlamaConfig):
        residual_scale: float = 1.0
        windows: dict[str, int] | None = None

    model, plain = nn.Linear(2, 2), llama_config()
    wanted = _identity(model, plain)
    unimportant: list[dict[str, Any]] = [
        {"use_cache": False}, {"architectures": None}, {"attention_dropout": 0.1}, {"initializer_range": 0.01},
        {"id2label": {0: "a", 1: "b", 2: "c"}}, {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1},
        {"attn_implementation": "eager"}, {"_name_or_path": "elsewhere"}, {"transformers_version": "4.0.0"},
        {"dtype": "bfloat16"}, {"mlp_bias": False}, {"rms_norm_eps": 0.000001},
    ]  # fmt: skip
    for changes in unimportant:
        assert _identity(model, llama_config(**changes)) == wanted, changes
    later = LaterConfig(**plain.to_dict())
    assert later.residual_scale == 1.0
    assert _identity(model, later) == wanted
    later.residual_scale = 0.5
    assert _identity(model, later) != wanted


def test_a_cache_of_another_identity_opens_and_is_not_gone_on_with(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one made before the configuration counted."""
    config = CacheConfig(
        teacher=str(teacher_folder), data=str(text_file), seq_len=16, max_sequences=4, out=tmp_path / "c"
    )
    with monkeypatch.context() as before:
        before.setattr("stillroom.pipeline.teacher_identity._not_by_default", lambda config: {})
        build_cache(config)
    assert len(stillroom.open_cache(tmp_path / "c")) == 4
    with pytest.raises(PlanMismatchError, match=r"teacher\.fingerprint"):
        build_cache(config)


def test_identity_sees_into_wrapped_tensors() -> None:
    """Quantised tensors are classes that hold plain ones; torch's own `TwoTensor` has the same shape."""
    from torch.testing._internal.two_tensor import TwoTensor

    def of(first: torch.Tensor, second: torch.Tensor) -> str:
        model = nn.Linear(2, 2, bias=False)
        model.weight = nn.Parameter(TwoTensor(first, second))
        return fingerprint(model)

    ones = torch.ones(2, 2)
    assert of(ones, ones) == of(ones.clone(), ones)
    assert len({of(ones, ones), of(ones, 2 * ones), of(2 * ones, ones)}) == 3


def test_weights_off_the_devices_are_refused() -> None:
    with pytest.raises(InputError, match="left off the devices"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_adapter_without_peft(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        InputError, match=r"needs the package peft, which is not installed: pip install 'stillroom\[peft\]'"
    ):
        _teacher(teacher_folder, adapter="somewhere")


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of peft, about ways in which it is used here
def test_adapter_is_part_of_the_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def adapter(name: str, **changes: Any) -> str:
        torch.manual_seed(0)
        settings: dict[str, Any] = dict(
            r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        base = AutoModelForCausalLM.from_pretrained(teacher_folder)
        model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, **changes})).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            wanted[name] = model(input_ids=TOKENS).logits
        return str(tmp_path / name)

    wanted: dict[str, torch.Tensor] = {}
    same = adapter("a"), adapter("b")
    scaled, on_head = adapter("c", lora_alpha=16), adapter("d", target_modules=["q_proj", "lm_head"])
    for name, folder in zip("acd", (same[0], scaled, on_head)):
        torch.testing.assert_close(_logits(teacher_folder, adapter=folder), wanted[name], rtol=1e-4, atol=1e-4)
    assert _teacher(teacher_folder, adapter=same[0]).chunked_head
    assert not _teacher(teacher_folder, adapter=on_head).chunked_head
    prints = {folder: _teacher(teacher_folder, adapter=folder).fingerprint for folder in (*same, scaled, on_head)}
    assert prints[same[0]] == prints[same[1]]
    assert len({*prints.values(), _teacher(teacher_folder).fingerprint}) == 4
    with pytest.raises(InputError, match="can not be put on teacher"):
        _teacher(teacher_folder, adapter=str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torchao, about torch
@pytest.mark.parametrize("head", [False, True])
def test_a_quantised_checkpoint_is_a_teacher(
    head: bool, teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that torchao quantised to 8 bits, opened as its own settings say; with `head`, its head too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, TorchAoConfig

    torch.manual_seed(0)
    plain, folder = make_tokenizer(tmp_path / "plain"), make_tokenizer(tmp_path / "quantised")
    LlamaForCausalLM(llama_config(tie_word_embeddings=False)).save_pretrained(plain)
    scheme = TorchAoConfig(Int8WeightOnlyConfig(version=2), include_input_output_embeddings=head)
    made = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=scheme)
    made.save_pretrained(folder)
    with torch.no_grad():
        own = made(input_ids=TOKENS).logits

    one, again, unquantised = _teacher(folder), _teacher(folder), _teacher(plain)
    assert one.fingerprint == again.fingerprint != unquantised.fingerprint
    assert (one.chunked_head, unquantised.chunked_head) == (not head, True)
    torch.testing.assert_close(_logits(folder), own, rtol=1e-5, atol=1e-5)
    assert (own - _logits(plain)).abs().max() > 0.01

    digests = []
    for name in "cd":
        out = tmp_path / name
        command = ["cache", "--teacher", str(folder), "--data", str(text_file), "--seq-len", "16", "--out", str(out)]
        assert main([*command, "--max-sequences", "12"]) == 0
        shards = sorted(path for path in (out / "shards").rglob("0") if path.is_file())
        digests.append([path.read_bytes() for path in shards])
    assert len(digests[0]) > 5
    assert digests[0] == digests[1]
    cache = stillroom.open_cache(tmp_path / "c")
    assert cache.manifest.teacher.fingerprint == one.fingerprint
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert one.fingerprint[:12] in capsys.readouterr().out
    assert audit_line(cache, again, sequences=12).sound
    assert not audit_line(cache, unquantised, sequences=12).sound
