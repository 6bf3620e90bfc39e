"""The parts of an HTML page in one file: tables, images and curves, without a script or a download."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ...data.bands import to_rgb
from ...data.images import read_image
from ...text import printable

__all__ = ["curves_svg", "gallery", "make_page", "table", "text"]

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
svg { height: auto; max-width: 100%; } svg text { fill: currentColor; font-size: 11px; }
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


def curves_svg(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw figures by epoch, 0 to 1, as an SVG.

    >>> curves_svg({"training": [0.5, 1.0]}).count("<polyline")
    1
    """
    width, height, margin = 640, 240, 30
    lines = []
    for place, (name, values) in enumerate(curves.items()):
        step = (width - 2 * margin) / max(len(values) - 1, 1)
        points = " ".join(
            f"{margin + index * step:.1f},{height - margin - value * (height - 2 * margin):.1f}"
            for index, value in enumerate(values)
        )
        colour = ("#4a7ebb", "#c0504d", "#7f9a48", "#8064a2")[place % 4]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{margin + 100 * place}" y="14" style="fill: {colour}">{text(name)}</text>')
    for share in (0, 0.5, 1):
        y = height - margin - share * (height - 2 * margin)
        lines.append(f'<line x1="{margin}" x2="{width - margin}" y1="{y}" y2="{y}" stroke="#8884"/>')
        lines.append(f'<text x="0" y="{y + 4}">{share:g}</text>')
    count = max(map(len, curves.values()))
    lines.append(f'<text x="{width - margin - 60}" y="{height - 8}">epoch {count}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(lines)}</svg>'


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
