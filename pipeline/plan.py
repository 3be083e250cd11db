"""`stillroom plan`: what a run of stage one will take and cost, from a measurement or from numbers.

Everything here is arithmetic on estimates: rows * bytes per row, rows / (rows per second), hours * price.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from stillroom.pipeline.intervals import Estimate
from stillroom.pipeline.plan_config import PlanConfig
from stillroom.storage.errors import InputError

GB: Final = 1e9
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take; every estimate has `value`, `low`, `high` (95 %) and `source` (`given`, `counted`, `measured`).

    Attributes:
        rows: rows of the whole run, one per token.
        entries_per_row: kept ids per row, or None where that was neither measured nor given.
        bytes_per_row: on disk, all in.
        bytes_by_array: of it, by array of the cache; empty where it was given.
        rows_per_s: of one worker.
        size_bytes: of the cache.
        workers: as given; `worker_hours` of all of them together (GPU-hours), `wall_hours` by the clock.
        compute_price, price_per_month: in the currency of the prices given, or None.
        sampler: of the run, draws solved where `entries_per_row` asked for it; None where nothing was measured.
        noise: lines of `plan_measure.NoiseLine`, empty where nothing was measured.
        top_k: a `plan_measure.TopKLine`, or None.
        measured: how the measurement was made (`sequences`, `rows`, `probe_rows`, `seconds`, `device`, `dtype`,
            `rows_with_targets`), or None.
        notes: what to know when reading the numbers.
    """

    rows: Estimate
    entries_per_row: Estimate | None
    bytes_per_row: Estimate
    bytes_by_array: dict[str, float]
    rows_per_s: Estimate
    size_bytes: Estimate
    workers: int
    worker_hours: Estimate
    wall_hours: Estimate
    compute_price: Estimate | None
    price_per_month: Estimate | None
    sampler: dict[str, Any] | None
    noise: tuple[dict[str, Any], ...]
    top_k: dict[str, Any] | None
    measured: dict[str, Any] | None
    notes: tuple[str, ...]


def make_plan(config: PlanConfig, on_progress: Any = lambda stage, done, total: None) -> Plan:
    """Plan a run. Numbers that `config` gives are not measured; with rate, bytes and tokens no teacher is loaded.

    Args:
        config: of the run, and what to reckon with.
        on_progress: told (stage, done, total): `pack`, `cache` and `count`; total 0 means unknown.

    Raises:
        InputError: settings that do not fit, or a teacher or corpus that can not be used.
    """
    config.sampler_spec()
    measuring = config.rows_per_s is None or config.bytes_per_row is None
    _check(config, measuring)
    found = None
    if measuring:
        from stillroom.pipeline.plan_measure import measure

        found = measure(config, on_progress)
    rows = _rows(config, on_progress)
    entries = found.entries_per_row if found else None
    if config.entries_per_row_measured is not None:
        entries = Estimate.exactly(config.entries_per_row_measured)
    if config.bytes_per_row is not None:
        bytes_per_row, by_array = Estimate.exactly(config.bytes_per_row), {}
    else:
        assert found is not None
        bytes_per_row, by_array = found.bytes_per_row, found.bytes_by_array
    rate = Estimate.exactly(config.rows_per_s) if config.rows_per_s is not None else None
    if rate is None:
        assert found is not None
        rate = Estimate.exactly(found.rows_per_s, "measured")
    size = rows.times(bytes_per_row)
    workers = config.workers or config.ranks or 1
    hours = rows.times(Estimate.exactly(1 / rate.value / HOUR_S, rate.source))
    return Plan(
        rows=rows,
        entries_per_row=entries,
        bytes_per_row=bytes_per_row,
        bytes_by_array=by_array,
        rows_per_s=rate,
        size_bytes=size,
        workers=workers,
        worker_hours=hours,
        wall_hours=_scaled(hours, 1 / workers),
        compute_price=None if config.gpu_hour_price is None else _scaled(hours, config.gpu_hour_price),
        price_per_month=None if config.gb_month_price is None else _scaled(size, config.gb_month_price / GB),
        sampler=found.manifest.sampler.to_json() if found else None,
        noise=tuple(asdict(line) for line in found.noise) if found else (),
        top_k=asdict(found.top_k) if found and found.top_k else None,
        measured=None if found is None else {
            name: getattr(found, name)
            for name in ("sequences", "rows", "probe_rows", "seconds", "device", "dtype", "rows_with_targets")
        },
        notes=_notes(workers, measuring, rate),
    )  # fmt: skip


def _check(config: PlanConfig, measuring: bool) -> None:
    if measuring:
        for name in ("teacher", "data"):
            if not getattr(config, name):
                raise InputError(
                    f"--{name} is missing, and without it nothing can be measured: give it, or --tokens, --rows-per-s and "
                    "--bytes-per-row"
                )
    elif config.entries_per_row is not None:
        raise InputError(
            "--entries-per-row is solved for on measured rows, and --rows-per-s with --bytes-per-row leave nothing to measure: "
            "drop one of the three"
        )
    elif config.tokens is None and not (config.teacher and config.data):
        raise InputError("--tokens is missing, and no --teacher and --data to count them: give one or the other")


def _rows(config: PlanConfig, on_progress: Any) -> Estimate:
    if config.tokens is not None:
        return Estimate.exactly(float(config.tokens))
    from stillroom.pipeline.corpus_size import corpus_tokens
    from stillroom.pipeline.teacher import load_tokenizer

    tokenizer = load_tokenizer(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    return corpus_tokens(config, tokenizer, on_progress=lambda done: on_progress("count", done, 0))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.source)


def _notes(workers: int, measuring: bool, rate: Estimate) -> tuple[str, ...]:
    notes = []
    if rate.source == "measured":
        notes.append("rows per second are this machine's; give --rows-per-s for the machines that will run")
    if workers > 1:
        notes.append(f"wall time takes {workers} workers to be {workers} times as fast as one")
    if measuring:
        notes.append("intervals are over the first sequences of the corpus: shuffle one that is sorted")
    return tuple(notes)
