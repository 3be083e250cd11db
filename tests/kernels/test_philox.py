"""Philox4x32-10 and what is built on it. Shapes: `N` rows, `D` draws."""

from __future__ import annotations

import random

import pytest
import torch

from stillroom.kernels.sample import uniforms
from stillroom.kernels.sample.philox import philox4x32, random_words, scale_to

M = 0xFFFFFFFF


def _philox(counter: list[int], seed: int) -> list[int]:
    """The same ten rounds in Python integers."""
    c, k = list(counter), [seed & M, seed >> 32]
    for _ in range(10):
        even, odd = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(odd >> 32) ^ c[1] ^ k[0], odd & M, (even >> 32) ^ c[3] ^ k[1], even & M]
        k = [(k[0] + 0x9E3779B9) & M, (k[1] + 0xBB67AE85) & M]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of the Random123 distribution, philox4x32 10
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([M, M, M, M], [M, M], "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], words: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    got = philox4x32((c0, c1, c2, c3), key[0] | key[1] << 32)
    assert " ".join(f"{int(word):08x}" for word in got) == words


def test_counter_layout_and_draw_order() -> None:
    """The packing of seed, sequence, row, stream and draw is what caches on disk were drawn with: it may not move."""
    seed, sequences, rows = 0x0123456789ABCDEF, [0, 1, 255, 256, (1 << 40) - 1], [0, 5, (1 << 24) - 1, 1, (1 << 24) - 1]
    high_ND, low_ND = random_words(seed, torch.tensor(sequences), torch.tensor(rows), stream=3, count=5)
    for n, (sequence, row) in enumerate(zip(sequences, rows)):
        packed = sequence << 24 | row
        for d in range(5):
            words = _philox([d // 2, packed & M, packed >> 32, 3], seed)[2 * (d % 2) :]
            assert (int(low_ND[n, d]), int(high_ND[n, d])) == (words[0], words[1])


def test_uniforms_are_the_top_53_bits() -> None:
    sequence_N, row_N = torch.arange(4000) // 100, torch.arange(4000) % 100
    high_ND, low_ND = random_words(9, sequence_N, row_N, stream=1, count=3)
    u_ND = uniforms(9, sequence_N, row_N, stream=1, count=3)
    assert u_ND.dtype == torch.float64
    assert u_ND.shape == (4000, 3)
    for n, d in ((0, 0), (17, 1), (3999, 2)):
        draw = int(high_ND[n, d]) << 32 | int(low_ND[n, d])
        assert float(u_ND[n, d]) == (draw >> 11) / 2**53
    # mean of 12,000 uniforms: standard error 1 / sqrt(12 * 12,000); and no two alike among 2**53 values
    assert abs(float(u_ND.mean()) - 0.5) < 4 / (12 * 12_000) ** 0.5
    assert len(set(u_ND.flatten().tolist())) == u_ND.numel()
    assert not torch.equal(u_ND, uniforms(9, sequence_N, row_N, stream=0, count=3))
    assert not torch.equal(u_ND, uniforms(10, sequence_N, row_N, stream=1, count=3))
    assert torch.equal(u_ND[:, :2], uniforms(9, sequence_N, row_N, stream=1, count=2))


def test_scale_to_is_the_exact_high_product() -> None:
    rng = random.Random(0)
    draws = [0, 1, (1 << 64) - 1, 1 << 63, M, 1 << 32, *(rng.getrandbits(64) for _ in range(500))]
    bounds = [1, 2, M, 1 << 32, (1 << 62) - 1, (1 << 63) - 1, *(rng.getrandbits(rng.randint(2, 62)) for _ in range(20))]
    words = torch.tensor([d >> 32 for d in draws]), torch.tensor([d & M for d in draws])
    for bound in bounds:
        assert scale_to(words, torch.tensor(bound)).tolist() == [d * bound >> 64 for d in draws]


@pytest.mark.parametrize(
    ("seed", "sequence", "row", "name"),
    [
        (-1, 0, 0, "seed"),
        (1 << 64, 0, 0, "seed"),
        (0, 1 << 40, 0, "sequence_N"),
        (0, 0, 1 << 24, "row_N"),
        (0, 0, -1, "row_N"),
    ],
)
def test_keys_out_of_range(seed: int, sequence: int, row: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        uniforms(seed, torch.tensor([sequence]), torch.tensor([row]), stream=0, count=1)


def test_no_rows() -> None:
    none_N = torch.zeros(0, dtype=torch.int64)
    assert uniforms(0, none_N, none_N, stream=0, count=3).shape == (0, 3)
