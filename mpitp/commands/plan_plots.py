"""The figure of a plan: memory and time over the number of ranks, stacked. matplotlib is needed here alone."""
from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt     # after the backend is chosen

from .plan_page import COLUMNS, NAMES, JobReport, PlanReport

PARTS = (("products", "C0"), ("memory", "C2"), ("messages", "C1"), ("python", "C3"))


def draw(path: str, report: PlanReport) -> None:
    """Draw a row of panels for each job: the memory of a rank, and the time of each of its phases."""
    panels = 1 + max(len(job.of_ranks[0].phases) for job in report.jobs)
    figure, axes = plt.subplots(len(report.jobs), panels, figsize=(5.2 * panels, 4 * len(report.jobs)), squeeze=False,
                                layout="constrained")
    for job, row in zip(report.jobs, axes):
        draw_memory(row[0], job, report)
        for index, axis in enumerate(row[1:]):
            if index < len(job.of_ranks[0].phases):
                draw_time(axis, job, index)
            else:
                axis.axis("off")
    figure.suptitle(f"{report.parameters:,} parameters, {report.dtype}, on {report.machine}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_memory(axis: Axes, job: JobReport, report: PlanReport) -> None:
    """Draw what the fullest rank holds, and what it may have."""
    bottom = [0.0] * len(job.of_ranks)
    for head, kinds in COLUMNS:
        height = [sum(of.bytes_of.get(kind, 0) for kind in kinds) / 2 ** 30 for of in job.of_ranks]
        if any(height):
            axis.bar(range(len(height)), height, bottom=bottom, label=head)
            bottom = [low + high for low, high in zip(bottom, height)]
    sharing = [report.ranks_per_host if report.device == "gpu" else min(of.ranks, report.ranks_per_host)
               for of in job.of_ranks]
    limit = [report.host_memory_bytes / ranks / 2 ** 30 for ranks in sharing]
    if min(limit) < 2 * max(bottom):
        axis.plot(range(len(limit)), limit, "k_", markersize=24, label="what a rank may have")
    axis.set_ylim(0, 1.15 * max(bottom))
    finish(axis, job, "memory of a rank (GiB)", "Training" if job.kind == "train" else "Generation")


def draw_time(axis: Axes, job: JobReport, index: int) -> None:
    """Draw the time of one phase by its parts."""
    bottom = [0.0] * len(job.of_ranks)
    longest = max(of.phases[index].seconds for of in job.of_ranks)
    scale, unit = (1, "seconds") if longest >= 1 else (1e3, "milliseconds")
    for part, color in PARTS:
        height = [scale * of.phases[index].seconds_of[part] for of in job.of_ranks]
        if any(height):
            axis.bar(range(len(height)), height, bottom=bottom, label="Python" if part == "python" else part,
                     color=color)
            bottom = [low + high for low, high in zip(bottom, height)]
    axis.set_ylim(0, 1.15 * max(bottom))
    finish(axis, job, f"time ({unit})", NAMES[job.of_ranks[0].phases[index].name])


def finish(axis: Axes, job: JobReport, label: str, title: str) -> None:
    """Name the axes, and hatch the numbers of ranks that do not fit."""
    for place, of in enumerate(job.of_ranks):
        if not of.fits:
            axis.axvspan(place - 0.5, place + 0.5, color="0.85", zorder=0)
    axis.set_xticks(range(len(job.of_ranks)), [str(of.ranks) for of in job.of_ranks])
    axis.set(xlabel="ranks (grey: not enough memory)" if not all(of.fits for of in job.of_ranks) else "ranks",
             ylabel=label, title=title)
    axis.legend(fontsize=8)
