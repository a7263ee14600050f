"""Contact sheets: the images found for each query, as one picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.errors import UsageError
from data.files import write_atomically
from data.problems import BadSample
from retrieval.regions.boxes import Box
from retrieval.search.config import picture_format
from retrieval.search.hit import Hit

THUMBNAIL = 168  # pixels a side, as all lengths here
GAP = 20
MARGIN = 40
COLUMNS = 10
TITLE_SIZE, CAPTION_SIZE = 30, 16
LINE = 21  # of a caption
CAPTION_LINES = 2
CELL = THUMBNAIL + 10 + LINE * (CAPTION_LINES + 1)
TITLE = 58

INK, FAINT, BORDER, EMPTY = "#1a1a1a", "#6b7280", "#e2e5ea", "#f3f4f6"
FOUND = "#d6336c"  # the box of a region


def contact_sheet(
    queries: Sequence[str], hits: Sequence[Sequence[Hit]], path: str | Path, credit: str = ""
) -> Image.Image:
    """Write a picture with a row of images per query, best first; return it.

    path: its suffix says the format, see `picture_format`. Each image has its caption and its
    cosine similarity below. More than ten hits wrap. credit: at the foot, in at most two lines.
    An image that cannot be found or read is drawn as an empty box, and a last line says how many
    there are; so does `info["lost"]` of the image returned, and `info["sought"]` names the first
    one's file. Raises `UsageError` where the picture cannot be written.
    """
    kind = picture_format(path)
    columns = max(1, min(COLUMNS, max((len(row) for row in hits), default=1)))
    heights = [-(-len(row) // columns) * (CELL + GAP) or LINE + 2 * GAP for row in hits]
    width = max(2 * MARGIN + columns * (THUMBNAIL + GAP) - GAP, 640)
    height = 2 * MARGIN + sum(TITLE + used for used in heights) - GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title_font, caption_font = map(ImageFont.load_default, (TITLE_SIZE, CAPTION_SIZE))
    y = MARGIN
    lost: list[str] = []  # the shards of these
    for number, (query, row, used) in enumerate(zip(queries, hits, heights, strict=True)):
        if number:
            draw.line((MARGIN, y - GAP // 2, width - MARGIN, y - GAP // 2), fill=BORDER)
        title = wrap(query, title_font, width - 2 * MARGIN, 1)[0]
        draw.text((MARGIN, y + 8), title, font=title_font, fill=INK)
        y += TITLE
        for place, hit in enumerate(row):
            x = MARGIN + (place % columns) * (THUMBNAIL + GAP)
            if not _draw_hit(sheet, draw, hit, x, y + (place // columns) * (CELL + GAP)):
                lost.append(hit.shard)
        if not row:
            draw.text((MARGIN, y), "nothing found", font=caption_font, fill=FAINT)
        y += used
    lines = wrap(credit, caption_font, width - 2 * MARGIN, 2) if credit else []
    if lost:
        line = f"{len(lost)} of {sum(map(len, hits))} images cannot be found or read: {lost[0]}"
        lines += wrap(line, caption_font, width - 2 * MARGIN, 1)
    if lines:
        sheet = ImageOps.expand(sheet, (0, 0, 0, LINE * len(lines) + GAP), "white")
    for number, line in enumerate(lines):
        corner = (MARGIN, height - GAP + LINE * number)
        ImageDraw.Draw(sheet).text(corner, line, font=caption_font, fill=INK)
    try:
        write_atomically(Path(path), lambda out: sheet.save(out, format=kind, quality=90))
    except (OSError, ValueError) as error:  # more pixels a side than the format has, among them
        raise UsageError(f"{path} cannot be written: {error}") from error
    sheet.info["lost"], sheet.info["sought"] = len(lost), lost[0] if lost else ""
    return sheet


def _draw_hit(sheet: Image.Image, draw: ImageDraw.ImageDraw, hit: Hit, x: int, y: int) -> bool:
    """Whether its image could be read."""
    box = (x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1)
    font = ImageFont.load_default(CAPTION_SIZE)
    found = True
    try:
        image = ImageOps.contain(hit.image(), (THUMBNAIL - 16, THUMBNAIL - 16))
    except (OSError, BadSample, UsageError):
        found = False
        draw.rounded_rectangle(box, radius=10, fill=EMPTY, outline=BORDER)
        draw.text((x + GAP, y + THUMBNAIL // 2 - GAP // 2), "no image", font=font, fill=FAINT)
    else:
        draw.rounded_rectangle(box, radius=10, fill="white", outline=BORDER)
        corner = (x + (THUMBNAIL - image.width) // 2, y + (THUMBNAIL - image.height) // 2)
        sheet.paste(image, corner)
        if hit.box is not None:
            draw.rectangle(_within(hit.box, corner, image.size), outline=FOUND, width=3)
    y += THUMBNAIL + 10
    for line in wrap(hit.caption or hit.key, font, THUMBNAIL, CAPTION_LINES):
        draw.text((x, y), line, font=font, fill=INK)
        y += LINE
    draw.text((x, y), f"{hit.similarity:.3f}", font=font, fill=FAINT)
    return found


def _within(box: Box, corner: tuple[int, int], size: tuple[int, int]) -> tuple[float, ...]:
    """A part of an image that is drawn at a corner, in pixels."""
    left, top, right, bottom = (
        corner[number % 2] + side * (size[number % 2] - 1) for number, side in enumerate(box)
    )
    return left, top, right, bottom


def wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int
) -> list[str]:
    """`text` broken between words into at most `max_lines` lines of `width` pixels; an ellipsis
    ends what does not fit. At least one line, possibly empty."""
    lines, words = [""], text.split()
    while words:
        line = f"{lines[-1]} {words[0]}".strip()
        if font.getlength(line) <= width:
            lines[-1] = line
            words.pop(0)
        elif lines[-1] and len(lines) < max_lines:
            lines.append("")
        else:
            lines[-1] = line
            break
    if words:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1].rstrip()
        lines[-1] += "…"
    return lines
