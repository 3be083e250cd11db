"""From figures of a cache and files to weights: ranges, domains, difference sampling, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.choose import Wanted, choose, domain_factors
from stillroom.storage.errors import InputError
from stillroom.storage.losses import SequenceLosses, load_losses, save_losses
from stillroom.storage.rows import row_statistics
from stillroom.storage.spec import SamplerSpec

SIZE = 20


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("choose") / "cache"
    made.write(root, made.manifest(SamplerSpec(draws=20), sequences=SIZE, sequences_per_shard=6))
    return open_cache(root)


@pytest.fixture
def losses(cache, tmp_path):
    """Write losses and give the file's path."""

    def make(loss_S, name="losses.arrow", of=cache):
        save_losses(tmp_path / name, of, SequenceLosses("m", "f" * 64, np.asarray(loss_S, np.float32)))
        return tmp_path / name

    return make


def read(choice):
    return np.flatnonzero(choice.selection.weight_S)


@pytest.mark.parametrize("column", ["label_logp", "entropy"])
def test_ranges_of_a_column_share_the_sequences_out(cache, column):
    value_S = getattr(row_statistics(cache), f"{column}_S")
    parts = [
        read(choose(cache, Wanted(select_by=column, select_from=low, select_to=high)))
        for low, high in ((0.0, 0.33), (0.33, 0.8), (0.8, 1.0))
    ]
    assert [len(part) for part in parts] == [7, 9, 4]
    assert sorted(np.concatenate(parts)) == list(range(SIZE))
    assert value_S[parts[0]].max() <= value_S[parts[1]].min()
    assert value_S[parts[1]].max() <= value_S[parts[2]].min()
    choice = choose(cache, Wanted(select_by=column, select_from=0.8), sequences=10)
    assert len(read(choice)) == 2
    assert read(choice).max() < 10
    rows_S = row_statistics(cache).rows_S[:10]
    assert choice.notes[0] == (
        f"2 of 10 sequences are read ({rows_S[read(choice)].sum() / rows_S.sum():.1%} of the rows with a target), 2 in an epoch"
    )


def test_files_of_numbers(cache, tmp_path):
    np.save(tmp_path / "score.npy", np.arange(SIZE)[::-1])
    assert read(choose(cache, Wanted(select_by=str(tmp_path / "score.npy"), select_to=0.25))).tolist() == [
        15,
        16,
        17,
        18,
        19,
    ]
    (tmp_path / "weights.txt").write_text("".join(f"{k % 3}\n" for k in range(SIZE)))
    choice = choose(SIZE, Wanted(sequence_weights=tmp_path / "weights.txt"))  # a source that is no cache
    np.testing.assert_array_equal(choice.selection.weight_S, np.arange(SIZE) % 3)
    assert "at most 2.00 times each" in choice.notes[0]
    score = np.arange(SIZE, dtype=float)
    score[:10] = np.nan  # no value: not selected
    np.save(tmp_path / "score.npy", score)
    assert read(choose(cache, Wanted(select_by=str(tmp_path / "score.npy"), select_to=0.5))).tolist() == list(
        range(10, 15)
    )


def test_difference_sampling_keeps_what_the_teacher_finds_likelier(cache, losses):
    teacher_S = row_statistics(cache).label_logp_S
    gain_S = np.random.default_rng(1).permutation(SIZE) / 10
    wanted = Wanted(select_by="difference", select_from=0.5, reference_losses=losses(-teacher_S + gain_S))
    assert sorted(read(choose(cache, wanted))) == sorted(np.argsort(gain_S)[10:])


def test_domain_factors_are_those_of_the_paper():
    student, teacher = np.array([3.0, 2.0, 2.5]), np.array([2.0, 1.9, 2.5])
    ratio = [np.exp(3.0) / np.exp(2.0), np.exp(2.0) / np.exp(1.9), 1.0]
    first = np.exp(ratio) / np.sum(np.exp(ratio))  # equation 1
    np.testing.assert_allclose(domain_factors(student, teacher, smoothing=1.0), first, rtol=1e-12)
    np.testing.assert_allclose(domain_factors(student, teacher), 0.5 * first + 0.5 / 3, rtol=1e-12)
    psi = first * np.exp(ratio)  # equation 2
    again = domain_factors(student, teacher, previous_D=first)
    np.testing.assert_allclose(again, 0.5 * psi / psi.sum() + 0.5 / 3, rtol=1e-12)
    np.testing.assert_allclose(domain_factors(np.array([12.0, 2.0]), np.array([1.0, 2.0])), [0.75, 0.25])  # no overflow


def test_domains_get_their_share_of_the_visits(cache, losses, tmp_path):
    domain_S = np.array(["web", "code", "web", "law"] * 5)
    (tmp_path / "domains.txt").write_text("\n".join(domain_S))
    known = row_statistics(cache)
    loss_S = -known.label_logp_S + np.where(domain_S == "law", 0.9, 0.1)
    loss_S[4:8] = np.nan  # a sample is enough
    wanted = dict(domains=tmp_path / "domains.txt", student_losses=losses(loss_S), domain_smoothing=0.4)
    choice = choose(cache, Wanted(**wanted))
    names = ["code", "law", "web"]
    seen = ~np.isnan(loss_S)
    means = [
        [np.average(x_S[rows], weights=known.rows_S[rows]) for x_S in (loss_S, -known.label_logp_S)]
        for rows in (seen & (domain_S == name) for name in names)
    ]
    factors = domain_factors(*np.array(means, np.float64).T, smoothing=0.4)
    weight_S = choice.selection.weight_S
    assert weight_S.sum() == pytest.approx(SIZE)
    assert [weight_S[domain_S == name].sum() / SIZE for name in names] == pytest.approx(factors.tolist(), rel=1e-5)
    assert f"law 25.0% -> {factors[1]:.1%}" in choice.notes[1]
    # Within what else is selected: a domain of which nothing is left has no share.
    np.save(tmp_path / "w.npy", (domain_S != "web") * 1.0)
    part_S = choose(cache, Wanted(**wanted, sequence_weights=tmp_path / "w.npy")).selection.weight_S
    assert not part_S[domain_S == "web"].any()
    assert part_S.sum() == pytest.approx(10)


def test_a_curriculum_by_the_teachers_certainty(cache):
    selection = choose(cache, Wanted(curriculum="label_logp", curriculum_start=0.3), ramp=64).selection
    np.testing.assert_array_equal(selection.difficulty_S, -row_statistics(cache).label_logp_S)
    assert (selection.start, selection.ramp) == (0.3, 64)
    entropy = choose(cache, Wanted(curriculum="entropy")).selection.difficulty_S
    np.testing.assert_array_equal(entropy, row_statistics(cache).entropy_S)


def test_losses_are_kept_for_the_cache_they_are_of(cache, losses, made, tmp_path):
    loss_S = np.arange(SIZE, dtype=np.float32)
    loss_S[3] = np.nan
    path = losses(loss_S)
    found = load_losses(path, cache)
    np.testing.assert_array_equal(found.loss_S, loss_S)
    assert (found.model, found.fingerprint) == ("m", "f" * 64)
    made.write(tmp_path / "other", made.manifest(SamplerSpec(draws=21), sequences=SIZE, sequences_per_shard=6))
    with pytest.raises(InputError, match="another cache"):
        load_losses(path, open_cache(tmp_path / "other"))
    data = bytearray(path.read_bytes())
    data[data.index(loss_S.tobytes()) + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match="measure again"):
        load_losses(path, cache)


def test_losses_of_a_cache_that_grew(made, tmp_path):
    root = tmp_path / "cache"
    made.write(root, made.manifest(SamplerSpec(draws=20), sequences=9, sequences_per_shard=3))
    (root / "commits" / "000001.json").rename(tmp_path / "record")
    partial = open_cache(root, partial=True)
    save_losses(tmp_path / "l.arrow", partial, SequenceLosses("m", "f", np.arange(6, dtype=np.float32)))
    (tmp_path / "record").rename(root / "commits" / "000001.json")
    grown = load_losses(tmp_path / "l.arrow", open_cache(root)).loss_S
    np.testing.assert_array_equal(grown, [0, 1, 2, np.nan, np.nan, np.nan, 3, 4, 5])


def test_what_can_not_be_chosen_is_refused_in_a_sentence(cache, losses, tmp_path):
    def refused(match, source=cache, **wanted):
        with pytest.raises(InputError, match=match) as raised:
            choose(source, Wanted(**wanted))
        assert "\n" not in str(raised.value)

    def file(name, content):
        np.save(tmp_path / name, content) if name.endswith("npy") else (tmp_path / name).write_text(content)
        return tmp_path / name

    whole, part = losses(np.ones(SIZE), "whole"), losses(np.where(np.arange(SIZE) > 4, np.nan, 1.0), "part")
    refused("column 'entropi' is unknown: wanted label_logp, entropy, difference, or a file", select_by="entropi")
    refused("column '.*nowhere.npy' is unknown", select_by=str(tmp_path / "nowhere.npy"))
    refused("hold no sequence, wanted 0 <= from < to <= 1", select_by="entropy", select_from=0.5, select_to=0.5)
    refused("nothing is selected", select_by="entropy", select_from=0.01, select_to=0.02)
    refused("name it with select_by", select_from=0.5)
    refused("give both, or neither", select_by="difference")
    refused("give both, or neither", select_by="entropy", reference_losses=whole)
    refused("lacks the losses of 15 of 20 sequences", select_by="difference", reference_losses=part)
    refused("does not exist: make it with", select_by="difference", reference_losses=tmp_path / "none")
    refused("entropy is made from a cache's figures", SIZE, select_by="entropy")
    refused("holds 19 values, wanted 20", sequence_weights=file("w.npy", np.ones(19)))
    refused("has nan for sequence 3", sequence_weights=file("w.npy", np.where(np.arange(SIZE) == 3, np.nan, 1.0)))
    refused("has -1.0 for sequence 0", sequence_weights=file("w.npy", -np.ones(SIZE)))
    refused("nothing is selected", sequence_weights=file("w.npy", np.zeros(SIZE)))
    refused("something else than numbers", sequence_weights=file("w.txt", "one\n" * SIZE))
    refused("no one-dimensional array", sequence_weights=file("w.npy", np.ones((SIZE, 2))))
    refused("can not be read", sequence_weights=file("w.npy", np.array([{}] * SIZE)))  # pickled: never opened
    refused("can not be read", sequence_weights=tmp_path / "nowhere.txt")
    refused("give domains and student_losses, or neither", student_losses=whole)
    domains = file("d.txt", "a\n" * 10 + "b\n" * 10)
    refused("no sequence of domain 'b' is measured", domains=domains, student_losses=part)
