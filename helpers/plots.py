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
    "max_tokens": "max_tokens (longest answer, tokens)",
    "max_new_tokens": "max_new_tokens (longest answer, tokens)",
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
    data = data.assign(**{parameter: numbers if numeric else data[parameter]}).sort_values(parameter)
    medians = data.groupby(parameter)[list(metrics)].median()

    figure = _figure(4.2 * len(metrics), 3.4, panels=len(metrics))
    described = []
    for axes, metric in zip(figure.axes, metrics, strict=True):
        label = _LABELS.get(metric, metric)
        if numeric:  # a line between categories would mean nothing
            line = medians[metric].to_numpy()
            axes.plot(medians.index, line, color=_BLUE, linewidth=1.5, label="median", zorder=1)
        axes.scatter(data[parameter], data[metric], color=_BLUE, edgecolor="white", label="a run", zorder=2)
        axes.set(xlabel=_LABELS.get(parameter, parameter), ylabel=label)
        axes.set_ylim(0, 1.15 * data[metric].max())
        axes.set_xticks(medians.index)
        _tidy(axes)
        values = ", ".join(f"{value} → {median:.3g}" for value, median in medians[metric].items())
        described.append(f"{label}: {values}")
    if numeric:
        figure.axes[0].legend(frameon=False)
    return _describe(figure, f"A point for each run against {parameter}. Medians of {'; '.join(described)}.")


def precision_plot(
    gated: pd.DataFrame, max_drop: float = evaluation.MAX_DROP, max_kl: float = evaluation.MAX_KL
) -> Figure:
    """A row a candidate: accuracy with its interval, KL divergence where it was measured, and speed.

    What passes is a filled circle, what fails a hollow one, and the winner's name is bold; dashed lines are
    the gate.

    Args:
        gated: what `evaluation.gate` returned: the measured columns, `passes` and `winner`, by candidate.
        max_drop: the gate's, as share of accuracy.
        max_kl: the gate's, in nats.
    """
    reference = evaluation.reference_among(gated.index)
    line = (gated.loc[reference, "accuracy"] - max_drop) * 100
    has_kl = gated["kl_divergence"].notna().any()
    figure = _figure(12 if has_kl else 8, 1.2 + 0.55 * len(gated), panels=3 if has_kl else 2)
    quality, *distance, speed = figure.axes
    _rows(quality, gated, "accuracy", scale=100)
    _gate(quality, line, f"gate: {max_drop * 100:g} points below {reference}")
    quality.set_xlabel("accuracy (% of the questions, 95 % interval)")
    for axes in distance:
        axes.set_xscale("symlog", linthresh=1e-3)  # a logarithmic axis that has a zero
        _rows(axes, gated, "kl_divergence")
        _gate(axes, max_kl, f"gate: {max_kl:g} nats")
        axes.set_xlabel(f"KL divergence from {reference} (nats)")
    _rows(speed, gated, "tokens_per_second")
    speed.set(xlim=(0, None), xlabel="speed of one request (tokens/s)")
    for axes in figure.axes[1:]:
        axes.tick_params(labelleft=False)
    described = [
        f"{name}: {row['accuracy']:.0%} right ({row['accuracy_low']:.0%} to {row['accuracy_high']:.0%}), "
        f"KL {row['kl_divergence']:.2g} nats, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['size_mb']:.0f} MB, {_fate(row)}"
        for name, row in gated.iterrows()
    ]
    gate = f"The gate is at {line:.0f}% and {max_kl:g} nats."
    text = f"Accuracy, KL divergence and speed of each candidate. {gate} {'; '.join(described)}."
    return _describe(figure, text)


def _rows(axes, gated: pd.DataFrame, column: str, scale: float = 1) -> None:
    """A circle for each candidate in a row of its own, and a bar for its interval if it has one."""
    values = gated[column] * scale
    rows = range(len(gated))
    if f"{column}_low" in gated:
        spans = [values - gated[f"{column}_low"] * scale, gated[f"{column}_high"] * scale - values]
        axes.errorbar(values, rows, xerr=spans, fmt="none", ecolor="0.4", zorder=1)
    colors = [_BLUE if passes else _ORANGE for passes in gated["passes"]]
    faces = [_BLUE if passes else "white" for passes in gated["passes"]]
    axes.scatter(values, rows, s=110, facecolor=faces, edgecolor=colors, linewidth=2, zorder=2)
    axes.set_yticks(
        rows, [f"{name}\n{row['size_mb']:.0f} MB, {_fate(row)}" for name, row in gated.iterrows()]
    )
    for name, wins in zip(axes.get_yticklabels(), gated["winner"], strict=True):
        name.set_fontweight("bold" if wins else "normal")
    axes.set_ylim(len(gated) - 0.5, -0.5)  # the first candidate on top
    _tidy(axes)


def _fate(row: pd.Series) -> str:
    if row.name == evaluation.BASELINE:
        return "baseline"
    if row["winner"]:
        return "winner"
    return "passes" if row["passes"] else "fails the gate"


def _gate(axes, bound: float, text: str) -> None:
    axes.axvline(bound, color="black", linewidth=1, linestyle="--", zorder=0.9)  # above the grid
    axes.set_title(text, fontsize="small")


def _figure(width: float, height: float, panels: int) -> Figure:
    """A figure with panels side by side; width and height in inches.

    Jupyter draws figures only once pyplot is imported, and draws them twice unless they are closed.
    """
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots(1, panels, figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def _describe(figure: Figure, text: str) -> Figure:
    """Let the figure carry its alternative text into the notebook, from where nbconvert takes it."""

    def mimebundle(**_) -> tuple[dict, dict]:
        from IPython.core.pylabtools import print_figure

        png = print_figure(figure, fmt="png", base64=True)
        return {"image/png": png}, {"image/png": {"alt": text}}

    figure._repr_mimebundle_ = mimebundle
    return figure


def _tidy(axes) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
