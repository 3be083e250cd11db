"""The paper's experiment in small: one teacher, one student, one text; only the kind of target differs.

`python -m benchmarks.compare [--tokens N] [--out DIR]` trains what is missing below DIR, then writes
docs/benchmarks/compare.{json,md} and two figures. Stopped and started again it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from stillroom.demo import SEQ_LEN, model_config, standard_library_text, teacher_config, training
from stillroom.pipeline.config import CacheConfig, CorpusConfig, TeacherConfig
from stillroom.pipeline.packing import pack
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.stages import sample_sequences
from stillroom.pipeline.teacher import Teacher, load_tokenizer
from stillroom.storage.cache import open_cache
from stillroom.storage.spec import SamplerSpec
from stillroom.train.evaluate import evaluate
from stillroom.train.run import train_student

SEEDS = (0, 1)
HELD_OUT_SEQUENCES = 192
MEASURE_SEQUENCES = 16


@dataclass(frozen=True)
class Arm:
    """One kind of target: which cache (None: none), which loss, which convention for the missing mass."""

    name: str
    loss: str
    sampler: SamplerSpec | None = None
    missing: str | None = None

    @property
    def folder(self) -> str:
        """Folder name of the arm's students."""
        return self.name.replace(" ", "-").replace("=", "").replace(",", "")


def entries_per_row(teacher: Teacher, tokens_SL1: np.ndarray, spec: SamplerSpec) -> float:
    """Mean entries per row over the given sequences."""
    parts = sample_sequences(teacher, spec, tokens_SL1, 0, batch_size=len(tokens_SL1))
    return sum(part.entries for part in parts) / sum(part.rows for part in parts)


def draws_for(kind: str, wanted: float, teacher: Teacher, tokens_SL1: np.ndarray) -> int:
    """The N at which sampler `kind` keeps `wanted` entries per row on average (entries grow with N: bisection)."""
    low, high = 1, 256
    while low < high:
        middle = (low + high) // 2
        if entries_per_row(teacher, tokens_SL1, SamplerSpec(kind, middle)) < wanted:  # type: ignore[arg-type]
            low = middle + 1
        else:
            high = middle
    return low


def arms_for(teacher: Teacher, tokens_SL1: np.ndarray) -> list[Arm]:
    """The arms; systematic and threshold also at the N that gives `random`'s mean entries."""
    wanted = entries_per_row(teacher, tokens_SL1, SamplerSpec("random", 50))
    equal = {kind: draws_for(kind, wanted, teacher, tokens_SL1) for kind in ("systematic", "threshold")}
    systematic = SamplerSpec("systematic", equal["systematic"], keep_logp="none")
    threshold = SamplerSpec("threshold", equal["threshold"], keep_logp="head")
    return [
        Arm("CE", "ce"),
        Arm("top-12 renormalised", "forward_kl", SamplerSpec("top_k", 12), "renormalise_teacher"),
        Arm("top-12 tail bucket", "forward_kl", SamplerSpec("top_k", 12), "tail_bucket"),
        Arm("top-50 renormalised", "forward_kl", SamplerSpec("top_k", 50), "renormalise_teacher"),
        Arm("random N=50", "forward_kl", SamplerSpec("random", 50, keep_logp="none")),
        Arm(f"systematic N={equal['systematic']}", "forward_kl", systematic),
        Arm(f"threshold N={equal['threshold']}", "forward_kl", threshold),
        Arm("threshold N=50", "forward_kl", SamplerSpec("threshold", 50)),
        Arm("full KD", "forward_kl"),
    ]  # fmt: skip


def run(out: Path, tokens: int) -> dict[str, Any]:
    """Train and evaluate every arm and seed that is missing; returns the figures."""
    start_s = time.perf_counter()
    text, held_out = standard_library_text(out / "text")
    config, teacher_folder = teacher_config(out, text), out / "teacher"
    tokenizer = load_tokenizer(str(config))
    corpus = CorpusConfig(data=str(text), seq_len=SEQ_LEN, max_sequences=tokens // SEQ_LEN)
    packed = pack(corpus, tokenizer)
    train_student(
        training(student=str(config), out=teacher_folder, loss="ce"), tokens_SL1=packed.tokens_SL1,
        on_progress=say("teacher"),
    )  # fmt: skip
    tokenizer.save_pretrained(teacher_folder)
    teacher = Teacher(TeacherConfig(teacher=str(teacher_folder)))
    arms = arms_for(teacher, packed.tokens_SL1[:: len(packed.tokens_SL1) // MEASURE_SEQUENCES][:MEASURE_SEQUENCES])
    held_SL1 = pack(
        CorpusConfig(data=str(held_out), seq_len=SEQ_LEN, max_sequences=HELD_OUT_SEQUENCES), tokenizer
    ).tokens_SL1
    student = model_config(out / "student-config", layers=2, hidden=128)
    any_cache = None
    figures: dict[str, Any] = {
        "tokens": tokens,
        "seeds": list(SEEDS),
        "held_out_rows": held_SL1.shape[0] * SEQ_LEN,
        "arms": {},
    }
    ordered = sorted(arms, key=lambda arm: arm.sampler is None)  # caches first: CE takes its tokens from one of them
    for arm in ordered:
        record: dict[str, Any] = {"runs": []}
        if arm.sampler is not None:
            name = "-".join([arm.sampler.kind, str(arm.sampler.draws), arm.sampler.keep_logp])
            any_cache = out / "caches" / name
            build_cache(
                CacheConfig(
                    **corpus.model_dump(), teacher=str(teacher_folder), out=any_cache, sampler=arm.sampler.kind,
                    draws=arm.sampler.draws, keep_logp=arm.sampler.keep_logp, sequences_per_shard=512,
                )
            )  # fmt: skip
            cache = open_cache(any_cache)
            rows = len(cache) * SEQ_LEN
            record["entries_per_row"] = cache.entries / rows
            record["bytes_per_row"] = sum(cache.bytes_by_array().values()) / rows
            record["bytes_by_array"] = {k: v / rows for k, v in cache.bytes_by_array().items()}
        for seed in SEEDS:
            folder = out / "students" / f"{arm.folder}-{seed}"
            result = train_student(
                training(
                    cache=any_cache, student=str(student), out=folder, loss=arm.loss, missing=arm.missing, seed=seed,
                    teacher=str(teacher_folder) if arm.name == "full KD" else None,
                    allow_biased=arm.missing is not None,
                ),
                on_progress=say(f"{arm.name} seed {seed}"),
            )  # fmt: skip
            kept = folder / "evaluation.json"
            if not kept.is_file():
                measured = evaluate(folder, tokens_SL1=held_SL1, teacher=teacher_folder)
                kept.write_text(json.dumps({**asdict(measured), "tokens_per_s": result.tokens_per_s}))
            record["runs"].append(json.loads(kept.read_text()))
        figures["arms"][arm.name] = record
    figures["arms"] = {arm.name: figures["arms"][arm.name] for arm in arms}
    add_gaps(figures["arms"])
    figures["seconds_this_run"] = time.perf_counter() - start_s
    return figures


def add_gaps(arms: dict[str, Any]) -> None:
    """Add per seed the share of the CE -> full-KD gap closed, in LM loss and in held-out KL."""
    for arm in arms.values():
        for seed_index, one in enumerate(arm["runs"]):
            for key in ("lm_loss", "kl"):
                ce, full = (arms[name]["runs"][seed_index][key] for name in ("CE", "full KD"))
                one[f"{key}_gap_closed"] = (ce - one[key]) / (ce - full)


def body(figures: dict[str, Any]) -> str:
    """The page below its heading."""

    def both(arm: dict[str, Any], key: str, form: str) -> str:
        values = [one[key] for one in arm["runs"]]
        return f"{format(statistics.mean(values), form)} ({', '.join(format(v, form) for v in values)})"

    arms = figures["arms"]
    resolved = {key: gap_and_spread(arms, key) for key in ("lm_loss", "kl")}
    rows = []
    for name, arm in arms.items():
        has_cache = "bytes_per_row" in arm
        shares = [
            both(arm, f"{key}_gap_closed", ".0%") if gap > 2 * spread else "-"
            for key, (gap, spread) in resolved.items()
        ]
        rows.append([
            name,
            f"{arm['entries_per_row']:.2f}" if has_cache else "",
            f"{arm['bytes_per_row']:.1f}" if has_cache else "",
            both(arm, "lm_loss", ".4f"), shares[0], both(arm, "kl", ".4f"), shares[1],
            both(arm, "ece", ".4f"), both(arm, "acceptance", ".4f"),
        ])  # fmt: skip
    header = [
        "target", "entries/row", "bytes/row", "LM loss", "% of loss gap", "KL to teacher", "% of KL gap", "ECE", "acceptance",
    ]  # fmt: skip
    tokens, rows_held = figures["tokens"], figures["held_out_rows"]
    teacher_loss = next(iter(arms.values()))["runs"][0]["teacher_lm_loss"]
    loss_gap, loss_spread = resolved["lm_loss"]
    unresolved = (
        f"CE and full KD end {loss_gap:.3f} nats of LM loss apart, seeds of one arm up to {loss_spread:.3f}: the gap in loss "
        "is not resolved at this size, so shares of it are left out. The teacher is to blame: after so few tokens it is "
        f"little better at the text ({teacher_loss:.3f}) than what a student learns from the text itself. KL to the teacher, "
        "acceptance and the damage done by top-k are far outside the spread.\n\n"
    )
    return (
        f"A 4-layer d-256 Llama-style teacher (held-out loss {teacher_loss:.4f}) and 2-layer d-128 students, each trained on "
        f"the same {tokens:,} tokens of Python's standard library, {rows_held:,} held-out rows from other files. Mean over two "
        'student seeds, both in brackets. "% of gap" is the share of the way from CE to full KD of the same seed. Bytes are '
        "the whole cache divided by its rows: ids, weights, tokens, label log-probability, entropy (and every entry's "
        "log-probability in `threshold N=50`, the head's in the other threshold arm, none in `random` and `systematic`). "
        "The teacher is young and its rows are flat: about 28 entries of 50 draws (the paper's teacher: 12).\n\n"
        + report.table(header, rows)
        + "\n\n"
        + (unresolved if loss_gap <= 2 * loss_spread else "")
        + "![LM loss against bytes per row](compare-loss.svg)\n\n"
        + "![acceptance against bytes per row](compare-acceptance.svg)\n"
    )


def gap_and_spread(arms: dict[str, Any], key: str) -> tuple[float, float]:
    """Mean distance from CE to full KD, and the largest distance between seeds of one of the two."""
    ends = [[one[key] for one in arms[name]["runs"]] for name in ("CE", "full KD")]
    return abs(statistics.mean(ends[0]) - statistics.mean(ends[1])), max(max(end) - min(end) for end in ends)


def draw(figures: dict[str, Any]) -> None:
    """The two figures: loss and acceptance against bytes per row, CE and full KD as lines."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "stillroom", "font.size": 10})
    for key, label, file in (
        ("lm_loss", "held-out LM loss (nats per token)", "compare-loss"),
        ("acceptance", "speculative acceptance", "compare-acceptance"),
    ):
        figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
        markers = iter("ov^sDPX*")
        for name, arm in figures["arms"].items():
            values = [one[key] for one in arm["runs"]]
            mean = statistics.mean(values)
            if "bytes_per_row" not in arm:
                axes.axhline(mean, color="0.35", linestyle="--" if name == "CE" else "-", linewidth=1, label=name)
                continue
            colour = "tab:red" if name.startswith("top") else "tab:orange" if name.startswith("random") else "tab:blue"
            axes.plot([arm["bytes_per_row"]] * len(values), values, color=colour, linewidth=1)
            axes.plot(arm["bytes_per_row"], mean, next(markers), color=colour, markersize=8, alpha=0.8, label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.set(xlabel="bytes per row, everything included", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(report.PAGES / f"{file}.svg", metadata={"Date": None})
        plt.close(figure)


def say(stage: str) -> Any:
    """A progress callback that prints a line every ten seconds."""
    last = [time.monotonic()]

    def line(done: int, total: int, metrics: dict[str, Any]) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"{stage}: step {done}/{total} {metrics}", flush=True)

    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=400_000, help="training tokens of the teacher and of each student"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--render", action="store_true", help="make page and figures again from the kept JSON")
    options = parser.parse_args()
    title = "Targets compared: same teacher, same student, same text"
    if options.render:
        figures = report.figures_of("compare")
        report.render("compare", title, body(figures))
    else:
        figures = run(options.out, options.tokens)
        report.save("compare", title, "make compare", figures, body(figures))
    draw(figures)


if __name__ == "__main__":
    main()
