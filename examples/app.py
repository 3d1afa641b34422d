"""A web page that shows where a Focal Transformer looks: choose a picture, then click on a point of it.

With several models, two can be compared side by side. The same file is what a Space on the Hub runs.
See `--help` and docs/visualization.md.
"""

import argparse
import base64
import functools
import html
import io
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from common.models import load_focal, prepare
from common.options import Problem, script_parser
from common.pictures import UnreadablePicture, load_picture
from focal_hf.attention_figures import LEVEL_COLOURS, QUERY_COLOUR, WINDOW_COLOUR
from focal_hf.visualization import (
    AttentionRecord,
    QueryAttention,
    attention_rollout,
    query_attention,
    record_attention,
    shaded,
    to_pixels,
)

try:
    import gradio as gr
except ImportError:
    sys.exit("error: this page needs Gradio: pip install 'focal-hf[app]'")

EXAMPLES = """\
examples:
  the model of `make quickstart`:
    python examples/app.py

  two models to compare, each a folder or a name on the Hub:
    python examples/app.py --model focal-tiny my_model
"""
DEFAULT_MODEL = "quickstart/model"
LONGEST = 8  # longest side in shorter sides, since models that take the whole picture need more time for longer ones
MOST_VIEWS = 40  # views in the cache of all visitors, of 30 MB each for Focal-Tiny
MOST_VISITORS = 1000  # visitors with stored choices; with more, the earliest must load the page again
SHOWN, CLICKED = 224, 480  # least size in pixels; smaller inputs are enlarged
NOTHING, THE_ANSWER, LAST = "none", "the model's answer", "last"
HEAT_COLOUR = (255, 96, 32)

TEXT = """\
# Where a Focal Transformer looks

Every point of a picture attends to near tokens **finely**, one by one, and to far tokens **coarsely**, in cells that
each pool many tokens. Click on the picture to see what that point attends to.
"""

KEY = f"""\
<div class="key"><i style="outline: 2px solid rgb{QUERY_COLOUR}"></i>the query token
<i style="outline: 2px solid rgb{WINDOW_COLOUR}"></i>its window. The strength of a colour is the
square root of the attention weight, relative to the highest weight of the level.</div>
"""
CSS = """\
.looks {display: flex; flex-wrap: wrap; gap: 12px}
.looks figure, .saliency figure {margin: 0; max-width: 300px}
.row > .saliency {flex: 1 1 200px; min-width: min(200px, 100%)}
.row > .seen {flex: 1 1 340px; min-width: min(340px, 100%)}
.looks figure {flex: 1 1 max(25% - 12px, min(46%, 200px))}
.looks.heads figure {flex: 0 1 112px}
.looks img, .saliency img {width: 100%; display: block; border-radius: 4px}
.looks figcaption, .saliency figcaption {font-size: 12px; line-height: 1.35; margin-top: 3px}
.key i {display: inline-block; width: 14px; height: 14px; margin: 0 4px -3px 8px; outline-offset: -4px}
.key i {background: #505050}
#picture img {cursor: crosshair}
#examples .grid-container {grid-template-columns: repeat(5, minmax(0, 1fr))}
#examples .thumbnail-item {width: 100%}
#examples .grid-wrap {height: auto; min-height: 0}
#levels label span::before {
    content: ""; display: inline-block; width: 12px; height: 12px; margin: 0 6px -1px 0; border-radius: 2px
}
""" + "".join(
    f"#levels label:nth-of-type({len(LEVEL_COLOURS)}n + {number}) span::before {{background: rgb{colour}}}\n"
    for number, colour in enumerate(LEVEL_COLOURS, 1)
)


@dataclass(frozen=True)
class Classifier:
    model: PreTrainedModel
    processor: BaseImageProcessor
    labels: list[str]


@dataclass(frozen=True)
class View:
    """The attention record of one model for a visitor's picture. Clicks are answered from it."""

    name: str
    labels: list[str]
    image: np.ndarray  # what the model sees, (height, width, 3)
    record: AttentionRecord


def load_classifier(name: str) -> Classifier:
    model, processor = load_focal(name)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    # Two classes of ImageNet have the name "crane", and two "maillot".
    labels = [label if names.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(names)]
    return Classifier(model, processor, labels)


def example_pictures(labels: list[str], folder: Path) -> list[Path]:
    """Pictures from scikit-learn, if it is installed: digits for models that classify digits, else photographs."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        return []
    if set(labels) == set("0123456789"):
        pictures = [(number * (255 / 16)).round().astype("uint8") for number in load_digits().images[10:20]]
    else:
        pictures = load_sample_images().images
    files = [folder / f"{number}.png" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    return files


def read_picture(file: str) -> Image.Image:
    try:
        picture = load_picture({"path": file, "bytes": None})
    except UnreadablePicture as error:
        raise Problem(
            f"This is not a picture that can be read: {str(error).replace(file, Path(file).name)}."
        ) from error
    width, height = picture.size
    if max(width, height) > LONGEST * min(width, height):
        raise Problem(f"This picture has {width} x {height} pixels; this page takes sides of up to 1 : {LONGEST}.")
    return picture


class Views:
    """A cache of [`View`]s. The least recently used views are dropped and computed again when needed."""

    def __init__(self, classifiers: dict[str, Classifier]):
        self.classifiers = classifiers
        self.lock = threading.Lock()  # `record_attention` must not run in two threads at once
        self.kept = functools.lru_cache(MOST_VIEWS)(self.compute)

    def compute(self, name: str, file: str) -> View:
        classifier = self.classifiers[name]
        pixel_values, image = prepare(classifier.processor, read_picture(file))
        return View(name, classifier.labels, image, record_attention(classifier.model, pixel_values))

    def __call__(self, file: str | None, *names: str) -> list[View]:
        """The views of a picture by some models. Without a picture, warns the visitor and returns none."""
        try:
            if file is None:
                raise Problem("no picture")
            with self.lock:
                return [self.kept(name, file) for name in names if name != NOTHING]
        except Problem:
            gr.Warning("There is no stored picture for this page: upload one, or load the page again.")
            return []


# ------------------------------------------------------------------------------------------------------------- pictures


def enlargement(image_size: tuple[int, int], least: int) -> int:
    """The integer factor by which the input of a model is enlarged on the page."""
    return max(1, -(-least // max(image_size)))


def enlarged(pixels: np.ndarray, least: int) -> Image.Image:
    scale = enlargement(pixels.shape[:2], least)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def draw_frames(pixels: np.ndarray, seen: QueryAttention, least: int) -> Image.Image:
    """The image with frames around the query token and its window."""
    height, width = seen.image_size
    picture = enlarged(pixels[:height, :width], least)
    side, draw = seen.stride * enlargement(seen.image_size, least), ImageDraw.Draw(picture)
    row, col = seen.query
    boxes = [(box, WINDOW_COLOUR, 1) for box in seen.window.tolist()]
    for (top, left, bottom, right), colour, line in [*boxes, ((row, col, row + 1, col + 1), QUERY_COLOUR, 2)]:
        if top * side < picture.height and left * side < picture.width:  # not wholly on padding
            right, bottom = min(right * side, picture.width), min(bottom * side, picture.height)
            draw.rectangle((left * side, top * side, right - 1, bottom - 1), outline=colour, width=line)
    return picture


def clickable(view: View, at: tuple[float, float], stage: int) -> Image.Image:
    seen = query_attention(view.record, at, min(stage, len(view.record.stages) - 1))
    return draw_frames(view.image, seen, CLICKED)


def figure(picture: Image.Image, caption: str) -> str:
    """HTML with the picture inside, since fetching dozens of files for a click would take longer than drawing them."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88, subsampling=0)
    address = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{address}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def attention_html(view: View, at: tuple[float, float], stage: int, layer: int, levels: list[int]) -> str:
    """HTML with the attention of a point in each stage, and in each head of one layer."""

    def draw_attention(stage: int, layer: int, head: int | None = None) -> tuple[Image.Image, QueryAttention]:
        seen = query_attention(view.record, at, stage, layer, head)
        drawn = [level for level in levels if level < len(seen.levels)]
        return draw_frames(shaded(view.image, seen, drawn), seen, SHOWN), seen

    parts = [
        f"<h3>{html.escape(view.name)}: each stage</h3><p>The mean over the heads of the last layer.</p>"
        "<div class='looks'>"
    ]
    for number in range(len(view.record.stages)):
        picture, seen = draw_attention(number, -1)
        shares = [f"{100 * level.weights.sum():.0f}\u00a0% on level {level.level}" for level in seen.levels]
        parts.append(figure(picture, f"stage {number}, layer {seen.layer}: {', '.join(shares)}"))
    parts.append("</div>")

    blocks = view.record.stages[stage] if stage < len(view.record.stages) else []
    if not -len(blocks) <= layer < len(blocks):
        return "".join([*parts, f"<p>There is no such layer in stage {stage} of this model.</p>"])
    heads, layer = blocks[layer].weights.shape[1], layer % len(blocks)
    parts.append(f"<h3>Each head of stage {stage}, layer {layer}</h3><div class='looks heads'>")
    parts += [figure(draw_attention(stage, layer, head)[0], f"head {head}") for head in range(heads)]
    return "".join([*parts, "</div>"])


def saliency_html(view: View, label: str) -> str:
    """HTML with the regions of the picture that support a class."""
    if label not in [THE_ANSWER, *view.labels]:
        return f"<p>This model has no class {html.escape(label)}.</p>"
    number = int(view.record.logits.argmax()) if label == THE_ANSWER else view.labels.index(label)
    name = view.labels[number]
    heat = to_pixels(attention_rollout(view.record, number), view.record.patch_size, view.record.image_size)
    if not heat.any():
        return f"<p>No region of the picture supports {html.escape(name)}.</p>"
    grey = 0.55 * view.image.mean(2, keepdims=True)
    pixels = grey + (heat / heat.max())[..., None] * (np.array(HEAT_COLOUR) - grey)
    return figure(enlarged(pixels.round().astype(np.uint8), SHOWN), f"Evidence for {name} (attention rollout)")


def top_answers(view: View) -> dict[str, float]:
    scores = np.exp(view.record.logits - view.record.logits.max())
    scores /= scores.sum()
    return {view.labels[number]: float(scores[number]) for number in np.argsort(-scores)[:5]}


# ----------------------------------------------------------------------------------------------------------------- page


def level_choices(views: list[View]) -> list[tuple[str, int]]:
    """The levels of all models and stages by name, with the sides of their cells in tokens."""
    cells = {}
    for block in (block for view in views for stage in view.record.stages for block in stage):
        for level, cell in enumerate(block.cells):
            cells.setdefault(level, set()).add(cell)
    names = {level: " or ".join(f"{cell} x {cell}" for cell in sorted(cells[level])) for level in sorted(cells)}
    return [
        (f"level {level}: cells of {names[level]} tokens" if level else "level 0: tokens", level) for level in names
    ]


def make_page(classifiers: dict[str, Classifier], examples: list[Path]) -> gr.Blocks:
    names, views_of = list(classifiers), Views(classifiers)
    # Gradio refuses choices that the page did not have when it was loaded, unless it knows the current choices.
    configs = [classifier.model.config for classifier in classifiers.values()]
    most_stages = max(len(config.depths) for config in configs)
    most_layers = max(max(config.depths) for config in configs)
    most_levels = max(1, *(max(config.focal_levels) for config in configs))
    all_labels = dict.fromkeys(label for classifier in classifiers.values() for label in classifier.labels)
    with gr.Blocks(title="Where a Focal Transformer looks", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        file = gr.State()
        at = gr.State((0.5, 0.5))

        gr.Markdown(TEXT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(show_label=False, format="jpeg", interactive=False, buttons=[], elem_id="picture")
                upload = gr.UploadButton("Upload a picture", file_types=["image"])
                gallery = gr.Gallery(
                    [str(file) for file in examples],
                    show_label=False,
                    columns=5,
                    fit_columns=False,
                    allow_preview=False,
                    buttons=[],
                    visible=bool(examples),
                    elem_id="examples",
                )
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    first = gr.Dropdown(names, value=names[0], label="Model", min_width=150)
                    second = gr.Dropdown(
                        [NOTHING, *names], value=NOTHING, label="Compare with", min_width=150, visible=len(names) > 1
                    )
                    label = gr.Dropdown(
                        [THE_ANSWER, *all_labels], value=THE_ANSWER, label="Show evidence for", min_width=150
                    )
                with gr.Row():
                    facts, answer, heat = [], [], []
                    for number in range(2):
                        with gr.Column(visible=number == 0, min_width=200) as column:
                            facts.append(column)
                            with gr.Row():
                                answer.append(gr.Label(num_top_classes=5, min_width=240))
                                heat.append(gr.HTML(elem_classes="saliency"))
                with gr.Row():
                    levels = gr.CheckboxGroup(
                        [(f"level {level}", level) for level in range(most_levels)],
                        label="Levels",
                        elem_id="levels",
                        scale=3,
                        min_width=220,
                    )
                    stage = gr.Radio(list(range(most_stages)), value=0, label="Heads of stage", scale=2, min_width=160)
                    layer = gr.Dropdown(
                        [LAST, *range(most_layers)], value=LAST, label="in layer", scale=1, min_width=100
                    )
                gr.HTML(KEY)
        with gr.Row():
            look = [gr.HTML(visible=number == 0, elem_classes="seen") for number in range(2)]

        def show(file: str | None, first: str, second: str, stage: int | None) -> list:
            """Run the models on a picture."""
            views = views_of(file, first, second)
            if not views:
                return gr.skip()
            stages = max(len(view.record.stages) for view in views)
            levels = level_choices(views)
            visible = [gr.update(visible=number < len(views)) for number in range(2)]
            return [
                gr.update(choices=list(range(stages)), value=min(stage or 0, stages - 1)),
                gr.update(choices=levels, value=[level for _, level in levels]),
                gr.update(choices=[THE_ANSWER, *views[0].labels], value=THE_ANSWER),
                *pad_to_two_columns([gr.update(value=top_answers(view), label=view.name) for view in views]),
                *pad_to_two_columns([saliency_html(view, THE_ANSWER) for view in views]),
                *visible,
                *visible,
            ]

        def update_figures(
            file: str | None, first: str, second: str, at: tuple, stage: int, layer: int | str, levels: list[int]
        ) -> list:
            """Draw the figures again after a choice."""
            views = views_of(file, first, second)
            return attention_figures(views, at, stage, layer, levels) if views else gr.skip()

        def attention_figures(views: list[View], at: tuple, stage: int, layer: int | str, levels: list[int]) -> list:
            layers = max(len(view.record.stages[stage]) for view in views if stage < len(view.record.stages))
            layer = LAST if layer == LAST or layer >= layers else layer
            number = -1 if layer == LAST else layer
            return [
                clickable(views[0], at, stage),
                gr.update(choices=[LAST, *range(layers)], value=layer),
                *pad_to_two_columns([attention_html(view, at, stage, number, levels) for view in views]),
            ]

        def click(
            file: str | None,
            first: str,
            second: str,
            stage: int,
            layer: int | str,
            levels: list[int],
            event: gr.SelectData,
        ) -> list:
            views = views_of(file, first, second)
            if not views:
                return gr.skip()
            height, width = views[0].record.image_size
            scale = enlargement((height, width), CLICKED)
            across, down = event.index
            point = min((across + 0.5) / (width * scale), 1), min((down + 0.5) / (height * scale), 1)
            return [point, *attention_figures(views, point, stage, layer, levels)]

        def accept_upload(file: str) -> str:
            try:
                read_picture(file)
            except Problem as problem:
                gr.Warning(str(problem))
                return gr.skip()
            return file

        def choose(event: gr.SelectData) -> str:
            return str(examples[event.index])

        def update_saliency(file: str | None, first: str, second: str, label: str) -> list:
            return pad_to_two_columns([saliency_html(view, label) for view in views_of(file, first, second)])

        upload.upload(accept_upload, upload, file)
        gallery.select(choose, None, file)
        # A choice made while an earlier one is drawn is drawn after it.
        quick = {"show_progress": "hidden", "trigger_mode": "always_last"}
        seen = [file, first, second]
        drawing = {
            "fn": update_figures,
            "inputs": [*seen, at, stage, layer, levels],
            "outputs": [picture, layer, *look],
        } | quick
        if examples:
            page.load(lambda: str(examples[0]), None, file)
        gr.on(
            [file.change, first.input, second.input],
            show,
            [*seen, stage],
            [stage, levels, label, *answer, *heat, *facts, *look],
        ).success(**drawing)
        gr.on([stage.input, layer.input, levels.input], **drawing)
        picture.select(click, [*seen, stage, layer, levels], [at, picture, layer, *look], **quick)
        label.input(update_saliency, [*seen, label], heat, **quick)
    return page


def pad_to_two_columns(parts: list) -> list:
    """Pad the outputs to the two columns of models. The second may be unused."""
    return [*parts, gr.skip(), gr.skip()][:2]


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--model",
        nargs="+",
        default=os.environ.get("FOCAL_MODELS", "").split(),
        metavar="NAME",
        help="Focal classifiers, each a folder or a name on the Hub (default: those that the environment variable "
        f"FOCAL_MODELS names, or {DEFAULT_MODEL} if that is there)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    logging.disable_progress_bar()
    try:
        if not args.model and not Path(DEFAULT_MODEL).is_dir():
            raise Problem(f"There is no {DEFAULT_MODEL} here: run `make quickstart`, or name a model with --model.")
        classifiers = {name: load_classifier(name) for name in args.model or [DEFAULT_MODEL]}
    except Problem as problem:
        sys.exit(f"error: {problem}")
    with tempfile.TemporaryDirectory() as folder:
        gr.set_static_paths(folder)
        # Gradio's own tools look for the page under the name `demo`.
        demo = make_page(classifiers, example_pictures(next(iter(classifiers.values())).labels, Path(folder)))
        demo.launch(
            theme=gr.themes.Default(font=gr.themes.Font("system-ui"), font_mono=gr.themes.Font("monospace")),
            css=CSS,
            footer_links=[],
            max_file_size="20mb",
            state_session_capacity=MOST_VISITORS,
            ssr_mode=False,
        )
