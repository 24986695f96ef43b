import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from helpers import evaluation, plots


@pytest.fixture
def gated():
    table = pd.DataFrame(
        {
            "accuracy": [0.675, 0.725, 0.6, 0.675],
            "tokens_per_second": [48.0, 137.0, 157.0, 17.0],
            "size_mb": [544.0, 271.0, 117.0, 542.0],
        },
        index=["fp32", "int8", "int4", "transformers"],
    )
    return evaluation.gate(table)


@pytest.fixture
def runs():
    return pd.DataFrame(
        {
            "params.max_new_tokens": ["8", "64", "16", "64", None],
            "params.dtype": ["float32", "bfloat16", "float32", "bfloat16", "float32"],
            "metrics.seconds": [0.4, 3.0, 0.8, 3.4, 1.0],
            "metrics.tokens_per_second": [20.0, 21.0, 20.5, 19.0, 20.0],
        }
    )


def _texts(figure):
    return " ".join(text.get_text() for text in figure.axes[0].texts)


def test_a_candidate_stands_at_its_speed_and_accuracy(gated):
    (points,) = plots.precision_plot(gated).axes[0].collections
    assert points.get_offsets().tolist() == [[48, 67.5], [137, 72.5], [157, 60], [17, 67.5]]


def test_the_area_of_a_marker_is_proportional_to_the_size_on_disk(gated):
    (points,) = plots.precision_plot(gated).axes[0].collections
    assert points.get_sizes() / points.get_sizes()[0] == pytest.approx(gated["size_mb"] / 544)


def test_every_candidate_is_named_with_its_fate(gated):
    texts = _texts(plots.precision_plot(gated))
    assert "int8\n271 MB, winner" in texts
    assert "int4\n117 MB, fails the gate" in texts
    assert "fp32\n544 MB, passes" in texts
    assert "transformers\n542 MB, passes" in texts


def test_no_line_runs_through_the_name_of_a_candidate(gated):
    *names, _gate = plots.precision_plot(gated).axes[0].texts
    assert len(names) == len(gated)
    for name in names:
        assert to_rgba(name.get_bbox_patch().get_facecolor()) == to_rgba("white")
        assert name.get_zorder() > 2  # lines are at 2 at most


@pytest.mark.parametrize(("max_drop", "height"), [(0.05, 62.5), (0.10, 57.5)])
def test_the_gate_is_drawn_where_it_is(gated, max_drop, height):
    figure = plots.precision_plot(gated, max_drop)
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([height, height])
    assert f"gate: {max_drop * 100:g} points below fp32" in _texts(figure)


def test_failing_is_told_by_a_hollow_marker_and_not_by_colour_alone(gated):
    (points,) = plots.precision_plot(gated).axes[0].collections
    hollow = [tuple(color) == to_rgba("white") for color in points.get_facecolor()]
    assert hollow == [not passes for passes in gated["passes"]]


def test_axes_carry_units(gated, runs):
    axes = plots.precision_plot(gated).axes + plots.runs_plot(runs, "max_new_tokens").axes
    labels = [label for one in axes for label in (one.get_xlabel(), one.get_ylabel())]
    assert labels == [
        "speed of one request (tokens/s)",
        "accuracy (% of the questions)",
        "max_new_tokens (longest answer, tokens)",
        "time of an answer (s)",
        "max_new_tokens (longest answer, tokens)",
        "speed (tokens/s)",
    ]


def test_numbers_are_ordered_as_numbers_and_runs_without_them_left_out(runs):
    seconds = plots.runs_plot(runs, "max_new_tokens").axes[0]
    assert seconds.collections[0].get_offsets().tolist() == [[8, 0.4], [16, 0.8], [64, 3.0], [64, 3.4]]


def test_the_line_goes_through_medians(runs):
    (line,) = plots.runs_plot(runs, "max_new_tokens", ["seconds"]).axes[0].lines
    assert line.get_ydata() == pytest.approx([0.4, 0.8, 3.2])


def test_categories_are_points_without_a_line(runs):
    axes = plots.runs_plot(runs, "dtype").axes[0]
    assert not axes.lines
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["bfloat16", "float32"]


def test_a_parameter_that_no_run_has_is_a_clear_error(runs):
    with pytest.raises(ValueError, match="No run has parameter 'threads'"):
        plots.runs_plot(runs, "threads")


def test_figures_can_be_saved_and_are_not_shown(gated, runs, tmp_path):
    for name, figure in {
        "precision": plots.precision_plot(gated),
        "runs": plots.runs_plot(runs, "dtype"),
    }.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.kernel
def test_jupyter_draws_a_figure_exactly_once():
    import nbformat
    from nbclient import NotebookClient

    source = """
import pandas as pd
from helpers import plots
runs = pd.DataFrame({"params.threads": ["1", "2"], "metrics.seconds": [2.0, 1.0]})
plots.runs_plot(runs, "threads", ["seconds"])
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=600).execute()
    drawn = [output for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 1


def test_figures_tell_their_figures_to_those_who_cannot_see_them(gated, runs):
    _, precision = plots.precision_plot(gated)._repr_mimebundle_()
    assert "int8: 72% right, 137 tokens/s, 271 MB, winner" in precision["image/png"]["alt"]
    _, study = plots.runs_plot(runs, "max_new_tokens")._repr_mimebundle_()
    assert "8 → 0.4, 16 → 0.8, 64 → 3.2" in study["image/png"]["alt"]
