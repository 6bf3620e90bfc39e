"""The parts of an HTML page in one file: tables and images, without a script or a download."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ...data.bands import to_rgb
from ...data.images import read_image
from ...text import printable

SIDE = 160  # of a thumbnail, in pixels

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { min-width: 6rem; overflow-wrap: anywhere; text-align: left; }
.matrix td { text-align: center; min-width: 2rem; } .matrix th { font-weight: normal; }
.images { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.pairs { display: grid; gap: .8rem 2rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
img { background: var(--soft); height: 8rem; object-fit: contain; width: 100%; }
img.whole { height: auto; max-width: 100%; width: auto; }
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
    """Show images, each with a caption and its name."""
    figures = [
        f'<figure><img alt="{text(path.name)}" src="{_thumbnail(path)}">'
        f"<figcaption>{text(caption)}<br>{text(path.name)}</figcaption></figure>"
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


def table(head_cells: Sequence[object], rows: Iterable[Sequence[object]], *, head: bool = True) -> str:
    lines = [f"<tr>{''.join(f'<th>{text(cell)}</th>' for cell in head_cells)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def text(value: object) -> str:
    """Escape a text; bytes of a file's name that are no text are written as escapes."""
    return html.escape(printable(value).encode(errors="backslashreplace").decode())
