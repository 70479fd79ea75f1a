"""Figures of bench reports (dicts as --json wrote them). matplotlib is needed here alone."""
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt     # after the backend is chosen

MARKERS = "os^Dv"
Report = dict[str, Any]


def draw_bench(path: str, reports: Sequence[Report]) -> None:
    """Time against size, strong scaling over the reports' rank counts, and a roofline: what the reports have of it."""
    panels = [panel for panel, bench in ((time_against_size, "allreduce"), (strong_scaling, "ffn"), (roofline, "ffn"),
                                              (block_scaling, "block"))
              if any(row["bench"] == bench for report in reports for row in report["rows"])]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.6), squeeze=False, layout="constrained")
    for panel, axis in zip(panels, axes[0]):
        panel(axis, reports)
        axis.grid(True, which="major", alpha=0.3)
    first = reports[0]
    figure.suptitle(f"mpitp {first['mpitp']}, {first['mpi']}, {first['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_scaling(path: str, study: dict[str, Any]) -> None:
    """Draw the points of a scaling study: time against ranks, a panel for each kind.

    Dotted is what 100% would be, dashed with hollow marks what the plan says.
    """
    kinds = list(dict.fromkeys(point["kind"] for point in study["points"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.6), squeeze=False, layout="constrained")
    for kind, axis in zip(kinds, axes[0]):
        of_kind = [point for point in study["points"] if point["kind"] == kind]
        for marker, name in zip(MARKERS * 2, dict.fromkeys((p["bench"], p["case"]) for p in of_kind)):
            points = [(p["ranks"], p["median_seconds"] * 1e3) for p in of_kind if (p["bench"], p["case"]) == name]
            line, = axis.loglog(*zip(*points), marker=marker, label=" ".join(name))
            ideal = [points[0][1] * (points[0][0] / ranks if kind == "strong" else 1) for ranks, _ in points]
            axis.loglog([ranks for ranks, _ in points], ideal, ":", color=line.get_color(), linewidth=1)
            planned = [(p["ranks"], p["planned_seconds"] * 1e3) for p in of_kind
                       if (p["bench"], p["case"]) == name and p.get("planned_seconds")]
            if planned:
                axis.loglog(*zip(*planned), "--", marker=marker, markerfacecolor="none", color=line.get_color(),
                            linewidth=1)
        ranks = sorted({point["ranks"] for point in of_kind})
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
        axis.set(xlabel="ranks", ylabel="time (milliseconds)", title=f"{kind} scaling (dotted: 100%, dashed: the plan)")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"mpitp {study['mpitp']}, {study['mpi']}, {study['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def rows_of(report: Report, bench: str) -> list[dict[str, Any]]:
    """Find the rows of one bench in a report."""
    return [row for row in report["rows"] if row["bench"] == bench]


def time_against_size(axis: Axes, reports: Sequence[Report]) -> None:
    """Draw the time of each collective against the size of its array, of the last report."""
    report = reports[-1]
    cases = list(dict.fromkeys(row["case"] for row in rows_of(report, "allreduce")))
    for marker, case in zip(MARKERS, cases):
        rows = [row for row in rows_of(report, "allreduce") if row["case"] == case]
        axis.loglog([row["bytes"] for row in rows], [row["median_seconds"] * 1e6 for row in rows], marker=marker,
                    label=case)
    axis.set(xlabel="size of the whole array (bytes)", ylabel="time (microseconds)",
             title=f"Collectives, {report['ranks']} ranks")
    axis.legend()


def block_scaling(axis: Axes, reports: Sequence[Report]) -> None:
    """Draw the strong scaling of a decoder block."""
    strong_scaling(axis, reports, "block", "Decoder block")


def strong_scaling(axis: Axes, reports: Sequence[Report], bench: str = "ffn", title: str = "Feed-forward") -> None:
    """Draw the time of one bench against the number of ranks, a report each."""
    reports = sorted(reports, key=lambda report: report["ranks"])
    cases = [row["case"] for row in rows_of(reports[-1], bench)]
    for marker, case in zip(MARKERS, cases):
        points = [(report["ranks"], row["median_seconds"] * 1e3) for report in reports
                  for row in rows_of(report, bench) if row["case"] == case]
        line, = axis.loglog(*zip(*points), marker=marker, label=case)
        if len(points) > 1:
            ranks, first = [rank for rank, _ in points], points[0]
            axis.loglog(ranks, [first[1] * first[0] / rank for rank in ranks], ":", color=line.get_color(), linewidth=1)
    ranks = sorted({report["ranks"] for report in reports})
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set(xlabel="ranks", ylabel="time (milliseconds)",
             title=f"{title}, h = {reports[0]['hidden_size']}, {reports[0]['tokens']} tokens (dotted: ideal)")
    axis.legend()


def roofline(axis: Axes, reports: Sequence[Report]) -> None:
    """Rate against arithmetic intensity, under the measured rate of bare products and the measured read bandwidth."""
    report = reports[-1]
    by_case = {row["case"]: row for row in report["rows"] if row["bench"] in ("matmul", "ffn")}
    size = 8 if report["dtype"] == "float64" else 4
    weights = 2 * report["hidden_size"] * report["ffn_hidden_size"] * size
    points = {}
    for name, row in by_case.items():
        if row["bench"] == "ffn":
            work = row["flops"] or 2 * weights // size
            moved = weights * (3 if "backward" in name else 1)
            points[name] = (work / moved, work / row["median_seconds"] / 1e9)
    if "products forward" in by_case and "read" in by_case:
        peak = max(by_case[name]["flops_per_second"] for name in by_case if name.startswith("products")) / 1e9
        bandwidth = by_case["read"]["bytes_per_second"] / 1e9
        grid = [2 ** (exponent / 4) for exponent in range(-8, 45)]
        axis.loglog(grid, [min(peak, bandwidth * x) for x in grid], "k-", linewidth=1,
                    label=f"limit: {peak:.0f} GF/s, {bandwidth:.0f} GB/s")
    for marker, (name, (intensity, rate)) in zip(MARKERS, points.items()):
        axis.loglog([intensity], [rate], marker, label=name)
    axis.set(xlabel="flops per byte of weights and their gradients", ylabel="rate of all ranks (GF/s)",
             title=f"Roofline, {report['ranks']} ranks")
    axis.legend(loc="lower right")


def draw_training(path: str, curve: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]],
                  baseline: float | None, title: str) -> None:
    """Draw bits a token against steps: training, validation, and the baseline as a line."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    axis.plot(*zip(*curve), linewidth=0.8, color="0.6", label="training, each step")
    if validation:
        axis.plot(*zip(*validation), marker="o", label="validation")
    if baseline is not None:
        axis.axhline(baseline, color="C1", linestyle=":", label="order-2 model of the same tokens")
    axis.set(xlabel="optimizer steps", ylabel="bits a token")
    axis.set_title(title, fontsize=8)
    axis.grid(True, alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
