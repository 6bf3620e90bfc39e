"""The parts of an HTML page in one file: tables and images, without a script or a download."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ...data.bands import to_rgb
from ...data.images import read_image
from ...text import printable

SIDE = 160  # of a thumbnail, in pixels

# The background of a scrolled table has a shadow where more of it is off-screen; its covers scroll with the content.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --shadow: #8888; }
body { background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 70rem; overflow-wrap: anywhere; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; background:
  linear-gradient(to right, Canvas 40%, transparent) local left, linear-gradient(to left, Canvas 40%, transparent)
  local right, linear-gradient(to right, var(--shadow), transparent) left, linear-gradient(to left, var(--shadow),
  transparent) right; background-repeat: no-repeat; background-size: 4rem 100%, 4rem 100%, 1rem 100%, 1rem 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { background: Canvas; left: 0; min-width: 4rem; position: sticky; text-align: left; }
th:first-child, td:first-child { max-width: 50vw; }
th:first-child, td:first-child, .facts td { overflow-wrap: anywhere; }
.words th, .words td { text-align: left; }
.matrix th { font-weight: normal; vertical-align: bottom; } .matrix td { min-width: 1.5rem; text-align: center; }
.matrix th:first-child { max-width: 8rem; min-width: 8rem; } .matrix .axis { text-align: left; }
.matrix bdi { display: block; max-height: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.matrix .axis span { left: 9.2rem; position: sticky; } .matrix .down { margin-left: auto; writing-mode: vertical-rl; }
.images { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.pairs { display: grid; gap: .8rem 2rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { font-size: .8rem; }
img { background: var(--soft); height: 8rem; object-fit: contain; width: 100%; }
img.whole { height: auto; max-width: 100%; width: auto; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .25rem .2rem; } }
@media (prefers-color-scheme: dark) { img.whole { filter: invert(1) hue-rotate(180deg); } }
"""


def make_page(title: str, parts: Iterable[str]) -> str:
    """Return a page of parts in HTML; a policy in it forbids scripts and any access to the network."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def picture(png: bytes) -> str:
    """Show a PNG in its own size."""
    return f'<img class="whole" alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def gallery(images: Iterable[tuple[Path, str]]) -> str:
    """Show images, each with a caption in HTML and its name."""
    figures = [
        f'<figure><img alt="{text(path.name)}" src="{_thumbnail(path)}">'
        f"<figcaption>{caption}<br>{show_name(path.name)}</figcaption></figure>"
        for path, caption in images
    ]
    return f'<div class="images">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def _thumbnail(path: Path) -> str:
    """Return a small JPEG of an image as a data URL; of one that is gone or broken by now an empty one."""
    try:
        image = to_rgb(read_image(path, None))
    except (OSError, ValueError):
        return "data:,"
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def table(head_cells: Sequence[object], rows: Iterable[Sequence[object]], style: str = "") -> str:
    """Show rows below a head; a wide table scrolls, except its first column. The style "words" is for text."""
    lines = [f"<tr>{''.join(f'<th>{text(cell)}</th>' for cell in head_cells)}</tr>"]
    lines += [_row(row) for row in rows]
    return f'<div class="wide"><table class="{style}">{"".join(lines)}</table></div>'


def facts_table(facts: Mapping[str, str]) -> str:
    """Show facts by name, one in a line."""
    return f'<div class="wide"><table class="facts words">{"".join(map(_row, facts.items()))}</table></div>'


def _row(cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"


def show_name(value: object, style: str = "") -> str:
    """Show the name of a file or class inside a text, whose order it does not change if it is written right to left."""
    escaped = text(value)
    return f'<bdi class="{style}" title="{escaped}">{escaped}</bdi>' if style else f"<bdi>{escaped}</bdi>"


def text(value: object) -> str:
    """Escape a text; bytes of a file's name that are no text are written as escapes."""
    return html.escape(printable(value).encode(errors="backslashreplace").decode())
