"""`stillroom plan`: the body of the command and its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillroom.console import Reporter, say, show_pairs, show_table

if TYPE_CHECKING:
    from stillroom.pipeline.intervals import Estimate
    from stillroom.pipeline.plan import Plan
    from stillroom.pipeline.plan_config import PlanConfig

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def plan(config: PlanConfig, as_json: bool) -> Plan:
    """`stillroom plan`."""
    from stillroom.pipeline.plan import make_plan

    with Reporter() as report:
        result = make_plan(config, on_progress=report)
    if not as_json:
        _show(result)
    return result


def _show(plan: Plan) -> None:
    sampler = plan.sampler
    pairs = [
        ("rows", _interval(plan.rows, "{:,.0f}")),
        ("sampler", "not measured" if sampler is None else f"{sampler['kind']}, N = {sampler['draws']}"),
        (
            "entries per row",
            "not measured" if plan.entries_per_row is None else _interval(plan.entries_per_row, "{:.2f}"),
        ),
        ("bytes per row", _interval(plan.bytes_per_row, "{:.2f}")),
        ("size", _size(plan.size_bytes)),
        ("rows per second of a worker", _interval(plan.rows_per_s, "{:,.0f}")),
        ("worker-hours (GPU-hours)", _interval(plan.worker_hours, "{:,.4g}")),
        (f"wall hours, {plan.workers} workers", _interval(plan.wall_hours, "{:,.4g}")),
    ]
    if plan.compute_price is not None:
        pairs.append(("price of the run", _interval(plan.compute_price, "{:,.2f}")))
    if plan.price_per_month is not None:
        pairs.append(("price of keeping it, a month", _interval(plan.price_per_month, "{:,.2f}")))
    show_pairs("plan", pairs)
    if plan.bytes_by_array:
        total = plan.bytes_per_row.value
        rows = [(name, f"{size:.2f}", f"{size / total:.1%}") for name, size in plan.bytes_by_array.items()]
        show_table("bytes per row", ("array", "bytes", "share"), rows)
    if plan.noise and sampler is not None:
        _show_noise(plan.noise, sampler["draws"])
    if plan.top_k is not None:
        _show_top_k(plan.top_k)
    for note in plan.notes:
        say(f"note: {note}")


def _show_noise(lines: tuple[dict[str, Any], ...], draws: int) -> None:
    kinds = list(lines[0]["relative_noise"])
    rows = [
        [
            f"{line['draws']}{' (this plan)' if line['draws'] == draws else ''}",
            f"{line['entries_per_row']:.2f}",
            f"{line['bytes_per_row']:.1f}",
            *(f"{line['relative_noise'][kind]:.4f}" for kind in kinds),
            *(f"{line['squared_error'][kind]:.2e}" for kind in kinds[:1]),
        ]
        for line in lines
    ]
    header = ("N", "entries", "bytes", *kinds, f"squared error, {kinds[0]}")
    show_table("gradient noise of a row by sampler, as a part of a hard label's", header, rows)


def _show_top_k(line: dict[str, Any]) -> None:
    show_pairs(
        f"top-k at equal bytes: k = {line['k']}",
        [
            ("bytes per row, top-k / this sampler", f"{line['bytes_per_row']:.2f} / {line['bytes_per_row_here']:.2f}"),
            ("kept mass", f"{line['kept_mass']:.4f}"),
            ("lost mass (never seen by a student)", f"{line['lost_mass']:.4f}"),
            ("squared bias, mass left missing", f"{line['squared_bias']:.2e}"),
            ("squared bias, renormalised", f"{line['squared_bias_renormalised']:.2e}"),
            ("squared error of this sampler, all noise", f"{line['squared_error_here']:.2e}"),
            (
                "rows over which that averages below the bias",
                "never" if line["rows_to_beat"] is None else f"{line['rows_to_beat']:.3g}",
            ),
        ],
    )


def _interval(estimate: Estimate, form: str) -> str:
    value = form.format(estimate.value)
    if estimate.low == estimate.high:
        return f"{value} ({estimate.source})"
    return f"{value} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def _size(size: Estimate) -> str:
    scale, unit = next((pair for pair in UNITS if size.value >= pair[0]), (1.0, "bytes"))
    low, value, high = (f"{number / scale:,.2f}" for number in (size.low, size.value, size.high))
    return f"{value} {unit}" + ("" if size.low == size.high else f" ({low} to {high})")
