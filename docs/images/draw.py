"""Draw the pictures with which the notebooks open: `python docs/images/draw.py` writes them beside this file.

The files are plain SVG with a background of their own, so that they read alike on a light and on a dark page.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, MARGIN, COLUMN, GAP = 960, 32, 156, 29  # pixels
TOP = 70  # of the row of boxes
USER, BETWEEN = 44, 10  # height of the boxes in the last column, and the space between them
INK, QUIET, LINE = "#1f2328", "#57606a", "#6e7781"
PAPER, PLAIN = "#ffffff", "#f3f4f6"
# MLflow's four parts: the colour of the name's background, and of what belongs to it.
PARTS = {
    "Projects": ("#6639ba", PAPER),
    "Tracking": ("#8a4600", "#fff6e8"),
    "Models": ("#0a53a8", "#eaf3ff"),
    "Model Registry": ("#116329", "#eafaee"),
}


@dataclass(frozen=True)
class Box:
    """Something that the notebook makes or uses: its name, two lines about it, MLflow's part if it is one."""

    name: str
    lines: tuple[str, str]
    part: str = ""


@dataclass(frozen=True)
class Picture:
    """What one notebook's picture says.

    Attributes:
        flow: what becomes what; the first column may hold two boxes, one made from the other.
        users: name and means of those who use the registered model.
        entry_point: its name in MLproject.
    """

    title: str
    description: str
    flow: tuple[tuple[Box, ...], ...]
    users: tuple[tuple[str, str], ...]
    entry_point: str


PICTURES = {
    "flow-01.svg": Picture(
        title="From a Transformers pipeline to a served model",
        description="Weights are loaded into a Transformers pipeline. It is logged as an MLflow model, which "
        "is registered as slm-transformers and used by Python, over REST and in Azure. MLflow Tracking keeps "
        "the runs and traces, MLflow Projects repeats the whole.",
        flow=(
            (Box("Weights", ("SmolLM2-135M", "or Phi-3-mini")),),
            (Box("Pipeline", ("Transformers", "on the processor")),),
            (Box("Logged model", ("speaks the Chat API:", "task llm/v1/chat"), "Models"),),
            (Box("slm-transformers", ("versions, reached by", "the alias candidate"), "Model Registry"),),
        ),
        users=(("Python", "pyfunc.load_model"), ("REST", "mlflow models serve"), ("Azure", "deploy/azureml")),
        entry_point="transformer_pipeline",
    ),
    "flow-02.svg": Picture(
        title="From an ONNX model in a class of your own to a served model",
        description="Weights are converted to an ONNX model, and a Python class wraps it. Both are logged as "
        "an MLflow model, which is registered as slm-onnx and used over REST, by OpenAI clients, by Spark "
        "and in Azure. MLflow Tracking keeps the runs and traces, MLflow Projects repeats the whole.",
        flow=(
            (
                Box("Weights", ("SmolLM2-135M", "or Phi-3-mini")),
                Box("ONNX model", ("with fewer bits:", "int8 or int4")),
            ),
            (Box("Wrapper", ("a PythonModel:", "your own class")),),
            (Box("Logged model", ("code and ONNX files,", "prompt in, text out"), "Models"),),
            (Box("slm-onnx", ("versions, reached by", "the alias champion"), "Model Registry"),),
        ),
        users=(
            ("REST", "mlflow models serve"),
            ("OpenAI client", "make serve"),
            ("Spark", "pyfunc.spark_udf"),
            ("Azure", "deploy/azureml"),
        ),
        entry_point="custom_python_wrapper",
    ),
}


def draw(picture: Picture) -> str:
    """Return the picture as SVG."""
    middle = TOP + (len(picture.users) * (USER + BETWEEN) - BETWEEN) / 2
    tracking = 2 * middle - TOP + 36  # the top of its bar
    height = tracking + 52 + 32
    drawn = [
        _rectangle(0.5, 0.5, WIDTH - 1, height - 1, PAPER, "#d0d7de", radius=10),
        *_projects(picture.entry_point, height),
        *_tracking(tracking, middle),
        *_users(picture.users, middle),
    ]
    for number, boxes in enumerate(picture.flow):
        drawn += _one(number, *boxes, middle) if len(boxes) == 1 else _two(number, *boxes, middle)
    drawn += [_arrow((_left(n) - GAP, middle), (_left(n), middle)) for n in (2, 3)]
    body = "\n".join(f"  {element}" for element in drawn)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}" \
role="img" aria-labelledby="title description" \
font-family="system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif">
  <title id="title">{escape(picture.title)}</title>
  <desc id="description">{escape(picture.description)}</desc>
  <defs>
    <marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
      <path d="M0 0.5 L7.5 4 L0 7.5 Z" fill="{LINE}"/>
    </marker>
  </defs>
{body}
</svg>
"""


def _left(column: int) -> float:
    return MARGIN + column * (COLUMN + GAP)


def _projects(entry_point: str, height: float) -> list[str]:
    """The frame around everything, with its name and its command in the upper edge."""
    colour, _ = PARTS["Projects"]
    words = f"repeats all of it with one command:  mlflow run . -e {entry_point}"
    return [
        _rectangle(14, 32, WIDTH - 28, height - 46, "none", colour, radius=8, dash="6 4"),
        _rectangle(MARGIN + 84, 20, 24 + 6.9 * len(words), 24, PAPER, PAPER),
        *_tag(MARGIN, 20, 84, "Projects"),
        _text(MARGIN + 98, 37, words, QUIET, anchor="start"),
    ]


def _tracking(top: float, middle: float) -> list[str]:
    """The bar below, and what reaches it: the run that logged the model, and the traces of its users."""
    colour, fill = PARTS["Tracking"]
    left, right = _left(1), WIDTH - MARGIN
    return [
        _rectangle(left, top, right - left, 52, fill, colour),
        *_tag(left, top, 84, "Tracking", height=52),
        _text(left + 100, top + 31, "keeps each run with its parameters and metrics,", INK, anchor="start"),
        _text(right - 16, top + 31, "and a trace of each answer", INK, anchor="end"),
        _arrow((_left(2) + COLUMN / 2, middle + 56), (_left(2) + COLUMN / 2, top)),
        _arrow((_left(4) + COLUMN / 2, 2 * middle - TOP), (_left(4) + COLUMN / 2, top)),
    ]


def _one(column: int, box: Box, middle: float) -> list[str]:
    """A column with one box; from the first, an arrow leads on."""
    arrows = [_arrow((_left(1) - GAP, middle), (_left(1), middle))] if column == 0 else []
    return [*_box(_left(column), middle - 56, 112, box), *arrows]


def _two(column: int, upper: Box, lower: Box, middle: float) -> list[str]:
    """A column with two boxes; the lower one is made from the upper one and goes on to the middle."""
    left, height = _left(column), middle - TOP - 17
    down, out = left + COLUMN / 2, left + COLUMN
    turn, low = out + GAP / 2 - 3, middle + 17 + height / 2
    return [
        *_box(left, TOP, height, upper),
        *_box(left, middle + 17, height, lower),
        _arrow((down, TOP + height), (down, middle + 17)),
        _arrow((out, low), (turn, low), (turn, middle), (_left(column + 1), middle)),
    ]


def _box(left: float, top: float, height: float, box: Box) -> list[str]:
    colour, fill = PARTS.get(box.part, (LINE, PLAIN))
    centre = left + COLUMN / 2
    drawn = [_rectangle(left, top, COLUMN, height, fill, colour)]
    first = top + height / 2 - 17
    if box.part:
        drawn += _tag(left, top, COLUMN, box.part)
        first += 14
    drawn.append(_text(centre, first, box.name, INK, size=14, weight=600))
    drawn += [_text(centre, first + 22 + 18 * row, line, QUIET) for row, line in enumerate(box.lines)]
    return drawn


def _users(users: tuple[tuple[str, str], ...], middle: float) -> list[str]:
    """The last column: who uses the registered model, each reached from its box."""
    left, start = _left(4), _left(4) - GAP
    turn = start + GAP / 2 - 3
    drawn = []
    for number, (name, means) in enumerate(users):
        top = TOP + number * (USER + BETWEEN)
        drawn += [
            _rectangle(left, top, COLUMN, USER, PLAIN, LINE),
            _text(left + COLUMN / 2, top + 19, name, INK, size=14, weight=600),
            _text(left + COLUMN / 2, top + 35, means, QUIET),
            _arrow((start, middle), (turn, middle), (turn, top + USER / 2), (left, top + USER / 2)),
        ]
    return drawn


def _tag(left: float, top: float, width: float, part: str, height: float = 24) -> list[str]:
    """The name of one of MLflow's parts, in white on its colour."""
    colour, _ = PARTS[part]
    return [
        _rectangle(left, top, width, height, colour, colour),
        _text(left + width / 2, top + height / 2 + 5, part, PAPER, weight=600),
    ]


def _rectangle(left, top, width, height, fill, stroke, radius=6, dash="") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"{dashes}/>'
    )


def _text(x, y, text, colour, size=13, weight=400, anchor="middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>'
    )


def _arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw(picture), encoding="utf-8", newline="\n")
