"""The few figures of the notebooks: returned, never shown, and readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers import evaluation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Two colours that differ in lightness as well (Okabe and Ito's palette for all kinds of colour vision).
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_LABELS = {
    "seconds": "time of an answer (s)",
    "tokens_per_second": "speed (tokens/s)",
    "completion_tokens": "length of the answer (tokens)",
    "max_tokens": "max_tokens (longest answer, tokens)",
    "max_new_tokens": "max_new_tokens (longest answer, tokens)",
    "threads": "threads",
}


def runs_plot(
    runs: pd.DataFrame, parameter: str, metrics: Sequence[str] = ("seconds", "tokens_per_second")
) -> Figure:
    """How metrics of MLflow runs move with one parameter: a panel a metric, a point a run.

    Args:
        runs: what `mlflow.search_runs` returns; runs that lack the parameter or every metric are left out.
        parameter: name of a logged parameter; numbers make a numeric axis with a line through the
            medians, anything else categories.
        metrics: names of logged metrics.
    Raises:
        ValueError: if no run has the parameter and a metric.
    """
    import pandas as pd

    columns = {f"params.{parameter}": parameter} | {f"metrics.{metric}": metric for metric in metrics}
    data = runs.reindex(columns=list(columns)).rename(columns=columns)
    data = data.dropna(subset=[parameter]).dropna(subset=list(metrics), how="all")
    if data.empty:
        raise ValueError(
            f"No run has parameter {parameter!r} and a metric of {', '.join(metrics)}; log both first."
        )
    numbers = pd.to_numeric(data[parameter], errors="coerce")
    numeric = numbers.notna().all()
    if numeric:
        data[parameter] = numbers
    data = data.sort_values(parameter)

    figure = _figure(4.2 * len(metrics), 3.4, panels=len(metrics))
    for axes, metric in zip(figure.axes, metrics, strict=True):
        medians = data.groupby(parameter)[metric].median()
        if numeric:  # a line between categories would mean nothing
            axes.plot(medians.index, medians.to_numpy(), color=_BLUE, linewidth=1.5, label="median", zorder=1)
        axes.scatter(data[parameter], data[metric], color=_BLUE, edgecolor="white", label="a run", zorder=2)
        axes.set(xlabel=_LABELS.get(parameter, parameter), ylabel=_LABELS.get(metric, metric))
        axes.set_ylim(0, 1.15 * data[metric].max())
        axes.set_xticks(medians.index)
        _tidy(axes)
    if numeric:
        figure.axes[0].legend(frameon=False)
    told = [
        f"{_LABELS.get(metric, metric)}: "
        + ", ".join(
            f"{value} → {median:.3g}" for value, median in data.groupby(parameter)[metric].median().items()
        )
        for metric in metrics
    ]
    return _described(figure, f"A point for each run against {parameter}. Medians of {'; '.join(told)}.")


def _fate(row: pd.Series) -> str:
    if row.name == evaluation.BASELINE:
        return "baseline"
    return "winner" if row["winner"] else "passes" if row["passes"] else "fails the gate"


def precision_plot(gated: pd.DataFrame, max_drop: float = evaluation.MAX_DROP) -> Figure:
    """Quality against speed, size on disk as area, with the gate's line.

    What passes is a filled circle, what fails a hollow one; the winner's name is bold.

    Args:
        gated: what `evaluation.gate` returned: `accuracy` (0 to 1), `tokens_per_second`, `size_mb`, `passes`
            and `winner`, indexed by candidate.
        max_drop: the gate's, as share of accuracy.
    """
    figure = _figure(7, 4.4)
    axes = figure.axes[0]
    speed, accuracy = gated["tokens_per_second"], gated["accuracy"] * 100
    reference = evaluation.reference_among(gated.index)
    line = (gated.loc[reference, "accuracy"] - max_drop) * 100
    axes.axhline(line, color="black", linewidth=1, linestyle="--", zorder=0.9)  # above the grid
    areas = _areas(gated["size_mb"])
    axes.scatter(
        speed,
        accuracy,
        s=areas,
        facecolor=[_BLUE if passes else "white" for passes in gated["passes"]],
        edgecolor=[_BLUE if passes else _ORANGE for passes in gated["passes"]],
        linewidth=2,
    )
    for place, name in enumerate(speed.sort_values().index):
        row, side = gated.loc[name], -1 if place % 2 else 1  # neighbours' labels on different sides
        axes.annotate(
            f"{name}\n{row['size_mb']:.0f} MB, {_fate(row)}",
            (speed[name], accuracy[name]),
            xytext=(0, side * (areas[name] ** 0.5 / 2 + 5)),
            textcoords="offset points",
            ha="center",
            va="bottom" if side > 0 else "top",
            fontweight="bold" if row["winner"] else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # no line runs through a label
        )
    low, high = min(accuracy.min(), line), max(accuracy.max(), line)
    room = 0.5 * max(high - low, 5)
    axes.set(xlim=(0, speed.max() * 1.25), ylim=(low - room, high + room))
    axes.annotate(
        f"gate: {max_drop * 100:g} points below {reference}",
        (1, line),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    axes.set(
        xlabel="speed of one request (tokens/s)",
        ylabel="accuracy (% of the questions)",
        title="Quality against speed; area is size on disk",
    )
    _tidy(axes)
    told = [
        f"{name}: {row['accuracy']:.0%} right, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['size_mb']:.0f} MB, {_fate(row)}"
        for name, row in gated.iterrows()
    ]
    return _described(figure, f"Accuracy against speed, with a gate at {line:.0f}%. {'; '.join(told)}.")


def _described(figure: Figure, text: str) -> Figure:
    """Let the figure carry its alternative text into the notebook, from where nbconvert takes it."""

    def mimebundle(**_) -> tuple[dict, dict]:
        from IPython.core.pylabtools import print_figure

        png = print_figure(figure, fmt="png", base64=True)
        return {"image/png": png}, {"image/png": {"alt": text}}

    figure._repr_mimebundle_ = mimebundle
    return figure


def _figure(width: float, height: float, panels: int = 1) -> Figure:
    """A figure with panels side by side; width and height in inches.

    Jupyter draws figures only once pyplot is there, and draws them twice unless they are closed.
    """
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots(1, panels, figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def _areas(sizes: pd.Series) -> pd.Series:
    """Marker areas in points², proportional to size; the largest has a diameter of some 40 points."""
    return 1600 * sizes / sizes.max()


def _tidy(axes) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
