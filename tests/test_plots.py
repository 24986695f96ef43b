import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from helpers import evaluation, plots


@pytest.fixture
def gated():
    table = pd.DataFrame(
        {
            "accuracy": [0.675, 0.725, 0.6, 0.675],
            "accuracy_low": [0.58, 0.63, 0.5, 0.58],
            "accuracy_high": [0.76, 0.80, 0.69, 0.76],
            "kl_divergence": [0.0, 0.0045, 0.31, 1e-10],
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


def _points(axes):
    (_bars, points) = axes.collections if len(axes.collections) == 2 else (None, *axes.collections)
    return points


def test_a_candidate_stands_in_its_row_at_its_accuracy_kl_and_speed(gated):
    quality, distance, speed = plots.precision_plot(gated).axes
    assert _points(quality).get_offsets().tolist() == [[67.5, 0], [72.5, 1], [60, 2], [67.5, 3]]
    assert _points(distance).get_offsets().tolist() == [[0, 0], [0.0045, 1], [0.31, 2], [1e-10, 3]]
    assert _points(speed).get_offsets().tolist() == [[48, 0], [137, 1], [157, 2], [17, 3]]


def test_the_bar_of_an_accuracy_is_its_interval(gated):
    bars, _ = plots.precision_plot(gated).axes[0].collections
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(pair) for pair in ([58, 76], [63, 80], [50, 69], [58, 76])]


def test_every_candidate_is_named_with_its_size_and_fate_and_the_winner_is_bold(gated):
    labels = plots.precision_plot(gated).axes[0].get_yticklabels()
    assert {label.get_text(): label.get_fontweight() for label in labels} == {
        "fp32\n544 MB, passes": "normal",
        "int8\n271 MB, winner": "bold",
        "int4\n117 MB, fails the gate": "normal",
        "transformers\n542 MB, passes": "normal",
    }


@pytest.mark.parametrize(("max_drop", "max_kl", "place"), [(0.05, 0.05, 62.5), (0.10, 0.02, 57.5)])
def test_the_gate_is_drawn_where_it_is(gated, max_drop, max_kl, place):
    quality, distance, _ = plots.precision_plot(gated, max_drop, max_kl).axes
    (line,), (bound,) = [
        [line for line in axes.lines if line.get_linestyle() == "--"] for axes in (quality, distance)
    ]
    assert list(line.get_xdata()) == pytest.approx([place, place])
    assert list(bound.get_xdata()) == pytest.approx([max_kl, max_kl])
    assert quality.get_title() == f"gate: {max_drop * 100:g} points below fp32"
    assert distance.get_title() == f"gate: {max_kl:g} nats"


def test_failing_is_shown_by_a_hollow_marker_and_not_by_colour_alone(gated):
    for axes in plots.precision_plot(gated).axes:
        hollow = [tuple(color) == to_rgba("white") for color in _points(axes).get_facecolor()]
        assert hollow == [not passes for passes in gated["passes"]]


def test_without_kl_there_is_no_panel_for_it(gated):
    gated = evaluation.gate(gated.drop("fp32").assign(kl_divergence=float("nan")))
    labels = [axes.get_xlabel() for axes in plots.precision_plot(gated).axes]
    assert labels == ["accuracy (% of the questions, 95 % interval)", "speed of one request (tokens/s)"]


def test_axes_carry_units(gated, runs):
    assert [axes.get_xlabel() for axes in plots.precision_plot(gated).axes] == [
        "accuracy (% of the questions, 95 % interval)",
        "KL divergence from fp32 (nats)",
        "speed of one request (tokens/s)",
    ]
    axes = plots.runs_plot(runs, "max_new_tokens").axes
    assert [label for one in axes for label in (one.get_xlabel(), one.get_ylabel())] == [
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


def test_figures_can_be_saved_also_of_candidates_that_say_nothing(gated, runs, tmp_path):
    silent = evaluation.gate(gated.assign(accuracy=0.0, accuracy_low=0.0, tokens_per_second=float("nan")))
    for figure in (plots.precision_plot(silent), plots.runs_plot(runs, "dtype")):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


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


def test_figures_carry_their_figures_as_alternative_text(gated, runs):
    _, precision = plots.precision_plot(gated)._repr_mimebundle_()
    text = "int8: 72% right (63% to 80%), KL 0.0045 nats, 137 tokens/s, 271 MB, winner"
    assert text in precision["image/png"]["alt"]
    _, study = plots.runs_plot(runs, "max_new_tokens")._repr_mimebundle_()
    assert "8 → 0.4, 16 → 0.8, 64 → 3.2" in study["image/png"]["alt"]
