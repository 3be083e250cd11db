"""What training on a cache would feel: the angle of its gradient to full distillation's as the batch grows, and what other
samplers, other N and top-k of the same bytes would have given on the same rows.

The gradient is that of the student's head matrix, sum over rows of (q - e) h for a student's distribution q, its features h
and a target e; full distillation has the teacher's p for e. An unbiased target's angle falls as the batch grows; a biased
one's comes to rest (Anshumann et al., ACL 2025, table 3). Features are projected to `WIDTH` random directions where the
matrix would be large: angles between sums of so many outer products survive it (Johnson and Lindenstrauss, 1984).

Shapes: `L` rows of a sequence, `V` vocabulary, `D` width of the features, `P` probe rows, `E` entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from stillroom.pipeline.audit.config import AuditConfig
from stillroom.pipeline.audit.draws import drawn, entry_rows
from stillroom.pipeline.audit.forward import logits, states
from stillroom.pipeline.audit.recompute import Progress
from stillroom.pipeline.config import TeacherConfig
from stillroom.pipeline.intervals import student_t
from stillroom.pipeline.plan_measure import noise_lines, top_k_line
from stillroom.pipeline.probe import PROBE_ELEMENTS, Probe
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

BATCHES: Final = (512, 2048, 8192)
BLOCK: Final = 512  # rows summed before anything is compared
MATRIX_ELEMENTS: Final = 1 << 22  # of a projected gradient
STUDENT_TEMPERATURE: Final = 1.5
PROBE_ROWS: Final = 512


@dataclass(slots=True)
class _Sums:
    """Gradients of a batch being summed, by arm; `full` is full distillation's."""

    rows: int = 0
    by_arm: dict[str, Tensor] = field(default_factory=dict)

    def add(self, rows: int, gradients: dict[str, Tensor]) -> None:
        self.rows += rows
        for arm, gradient_VD in gradients.items():
            if arm in self.by_arm:
                self.by_arm[arm] += gradient_VD
            else:
                self.by_arm[arm] = gradient_VD.clone()


def worth(
    config: AuditConfig, cache: Cache, teacher: Teacher, indices: list[int], on_progress: Progress
) -> dict[str, Any]:
    """Gradient figures over at most 8,192 of the rows, and tables of alternatives over some of them.

    Raises:
        InputError: a student that can not be loaded, or has another vocabulary.
    """
    manifest = cache.manifest
    student = None if config.student is None else _student(config, teacher)
    length = manifest.packing.seq_len
    some = indices[: max(1, BATCHES[-1] // length)]
    mean_entries = cache.entries / max(1, len(cache) * length)
    arms = {"the cache": None} | _arms(manifest, mean_entries)
    sums = {batch: _Sums() for batch in BATCHES}
    found: dict[int, list[dict[str, Any]]] = {batch: [] for batch in BATCHES}
    probes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    each = max(1, min(length, PROBE_ROWS // len(some), PROBE_ELEMENTS // manifest.vocab_size // len(some)))
    divergence: list[float] = []
    block = _Sums()
    for done, index in enumerate(some):
        tokens_L1, targets = cache[index]
        starts = cache.starts([index])
        logits_LV, states_LX = _read(teacher, tokens_L1[None], starts)
        student_LV, features_LX = logits_LV / STUDENT_TEMPERATURE, states_LX
        if student is not None:
            student_LV, features_LX = _read(student, tokens_L1[None], starts)
            student_LV = student_LV[:, : manifest.vocab_size]
        kept = torch.from_numpy(np.flatnonzero(np.diff(targets.offsets) > 0))
        labels_L = torch.from_numpy(tokens_L1[1:].astype(np.int64))
        number_L = torch.full_like(labels_L, cache.sequence_number(index))
        row_L = torch.arange(length)
        few = kept[torch.linspace(0, len(kept) - 1, min(each, len(kept))).long()] if len(kept) else kept
        probes.append((logits_LV[few.to(logits_LV.device)], labels_L[few], number_L[few], row_L[few]))
        features_LD = _projected(features_LX, manifest.vocab_size)
        targets_of = {
            arm: targets if spec is None else drawn(spec, logits_LV, labels_L, number_L, row_L)
            for arm, spec in arms.items()
        }
        for start in range(0, len(kept), BLOCK):
            rows = kept[start : start + BLOCK].to(logits_LV.device)
            p_NV, q_NV = logits_LV[rows].softmax(-1), student_LV[rows].softmax(-1)
            divergence.append(float((p_NV * (p_NV.clamp_min(1e-30) / q_NV.clamp_min(1e-30)).log()).sum(1).mean()))
            features_ND = features_LD[rows]
            gradients = {"full": (q_NV - p_NV).T @ features_ND}
            for arm, of_arm in targets_of.items():
                spec = arms[arm]
                e_NV = _dense(
                    of_arm, rows, manifest.vocab_size, renormalise=spec is not None and spec.kind in TOP_KINDS
                )
                gradients[arm] = (q_NV * e_NV.sum(1, keepdim=True) - e_NV).T @ features_ND
            block.add(len(rows), gradients)
            if block.rows >= BLOCK or (done == len(some) - 1 and start + BLOCK >= len(kept)):
                for batch, each_sums in sums.items():
                    each_sums.add(block.rows, block.by_arm)
                    if each_sums.rows >= batch:
                        found[batch].append(_compared(each_sums))
                        sums[batch] = _Sums()
                block = _Sums()
        on_progress("gradient", done + 1, len(some))
    for batch, smaller in zip(BATCHES, (0, *BATCHES)):
        if not found[batch] and sums[batch].rows > smaller:  # fewer rows than asked for, said so
            found[batch].append(_compared(sums[batch]))
    probe = Probe(*(torch.cat(parts) for parts in zip(*probes)))
    return {
        "gradient": {
            "student": config.student or f"the teacher at temperature {STUDENT_TEMPERATURE:g}",
            "kl_to_student": float(np.mean(divergence)) if divergence else None,
            "arms": {arm: "as stored" if spec is None else _named(spec) for arm, spec in arms.items()},
            "batches": [line for batch in BATCHES for line in _lines(batch, found[batch])],
            "plateau": _plateau(found),
        },
        "alternatives": _alternatives(cache, probe),
    }


def _arms(manifest: Manifest, mean_entries: float) -> dict[str, SamplerSpec]:
    """What else could have been kept: top-k of as many entries, independent draws, fewer and more of the same."""
    spec = manifest.sampler
    k = max(1, min(manifest.vocab_size, round(mean_entries)))
    arms = {f"top-{k} renormalised": SamplerSpec(kind="top_k", draws=k)}
    if spec.kind not in TOP_KINDS:
        if spec.kind != "random":
            arms[f"random, N = {spec.draws}"] = SamplerSpec(kind="random", draws=spec.draws, seed=spec.seed)
    else:
        arms["threshold, N = 50"] = SamplerSpec(kind="threshold", draws=50, seed=spec.seed)
    return arms


def _named(spec: SamplerSpec) -> str:
    return f"{spec.kind}, N = {spec.draws}"


def _compared(sums: _Sums) -> dict[str, Any]:
    full_VD = sums.by_arm["full"]
    norm = float(full_VD.norm())
    result: dict[str, Any] = {"rows": sums.rows}
    if norm < 1e-9 * sums.rows:  # the student is the teacher: there is no gradient to compare with
        norm = math.nan
    for arm, gradient_VD in sums.by_arm.items():
        if arm == "full":
            continue
        size = max(1e-30, float(gradient_VD.norm()))
        cosine = float((gradient_VD * full_VD).sum()) / (norm * size)
        result[arm] = {
            "angle": math.degrees(math.acos(float(np.clip(cosine, -1.0, 1.0)))),
            "ratio": size / norm,
            "error": float((gradient_VD - full_VD).norm()) / norm,
        }
    return result


def _lines(batch: int, found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for arm in found[0] if found else ():
        if arm == "rows":
            continue
        line: dict[str, Any] = {"batch": batch, "rows": found[0]["rows"], "batches": len(found), "arm": arm}
        for name in ("angle", "ratio", "error"):
            values = [each[arm][name] for each in found]
            mean, half = float(np.mean(values)), math.inf
            if len(values) > 1:
                half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
            line[name] = {"mean": mean, "low": mean - half, "high": mean + half}
        yield line


def _plateau(found: dict[int, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Squared relative error of the gradient as bias**2 + variance / rows, least squares over the batches."""
    result = {}
    every = [each for batches in found.values() for each in batches]
    if any(math.isnan(figures["error"]) for each in every for arm, figures in each.items() if arm != "rows"):
        return {}
    arms = [arm for arm in (every[0] if every else ()) if arm != "rows"]
    for arm in arms:
        rows = np.array([each["rows"] for each in every], np.float64)
        square = np.array([each[arm]["error"] ** 2 for each in every])
        design = np.stack([np.ones_like(rows), 1 / rows], 1) * np.sqrt(rows)[:, None]
        if len(np.unique(rows)) < 2:
            continue
        bias, variance = np.linalg.lstsq(design, square * np.sqrt(rows), rcond=None)[0]
        result[arm] = {"bias": math.sqrt(max(0.0, float(bias))), "variance": max(0.0, float(variance))}
    return result


def _alternatives(cache: Cache, probe: Probe) -> dict[str, Any]:
    """Tables on the probe rows: the noise of other N and samplers, and top-k of the same bytes."""
    manifest = cache.manifest
    rows = len(cache) * manifest.packing.seq_len
    bytes_per_row = sum(cache.bytes_by_array().values()) / rows
    result: dict[str, Any] = {"rows": probe.rows, "bytes_per_row": bytes_per_row}
    if not probe.rows:
        return result
    result["noise"] = [asdict(line) for line in noise_lines(probe, manifest, bytes_per_row)]
    if manifest.sampler.kind not in TOP_KINDS:
        result["top_k"] = asdict(top_k_line(probe, manifest))
    return result


@torch.inference_mode()
def _read(teacher: Teacher, tokens_1L1: Any, starts: Any) -> tuple[Tensor, Tensor]:
    states_LX = states(teacher, tokens_1L1, starts, 1)[0]
    return logits(teacher, states_LX).clone(), states_LX.clone()


def _projected(states_LX: Tensor, vocabulary: int) -> Tensor:
    width = states_LX.shape[1]
    most = max(8, MATRIX_ELEMENTS // vocabulary)
    if width <= most:
        return states_LX.float()
    generator = torch.Generator().manual_seed(width * most)  # the same directions for every sequence
    directions_XD = torch.randn(width, most, generator=generator).to(states_LX.device) / math.sqrt(most)
    return states_LX.float() @ directions_XD


def _dense(targets: SparseTargets, rows: Tensor, vocabulary: int, *, renormalise: bool) -> Tensor:
    whole_LV = torch.zeros(targets.rows, vocabulary, device=rows.device)
    row_E = torch.from_numpy(entry_rows(targets)).to(rows.device)
    ids_E = torch.from_numpy(targets.ids.astype(np.int64)).to(rows.device)
    whole_LV[row_E, ids_E] = torch.from_numpy(targets.weights.copy()).to(rows.device)
    e_NV = whole_LV[rows]
    return e_NV / e_NV.sum(1, keepdim=True) if renormalise else e_NV


def _student(config: AuditConfig, teacher: Teacher) -> Teacher:
    """The student, run as a teacher is."""
    assert config.student is not None
    try:
        student = Teacher(TeacherConfig(teacher=config.student, device=config.device, dtype="auto"))
    except InputError as error:
        raise InputError(str(error).replace("teacher", "student")) from error
    if student.vocab_size < teacher.vocab_size:
        raise InputError(
            f"student {config.student} has {student.vocab_size} ids, the teacher {teacher.vocab_size}: give one with the same "
            "vocabulary, or leave --student out"
        )
    return student
