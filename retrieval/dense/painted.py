"""Masks and boxes as pictures that people look at, in Pascal VOC's colours."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from data.dense.picture import BACKGROUND
from retrieval.dense.average_precision import ScoredBox

MOST_SIDE = 1600  # pixels of a painted picture
COVER = 0.6  # of the colour over what has a class
FONT, LINE, GAP = 16, 26, 12  # of the names below, pixels


def palette() -> UInt8[np.ndarray, "256 3"]:
    """The colour of each label, as Pascal VOC has it: three bits of the label for each bit of red,
    green and blue, the highest first. 0 is black."""
    labels, colours = np.arange(256), np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def mask_image(mask: UInt8[np.ndarray, "h w"]) -> Image.Image:
    """A mask whose pixels are its labels, and which is shown in colours: with a palette."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    return image


def painted(
    picture: Image.Image, mask: UInt8[np.ndarray, "h w"], class_names: Sequence[str]
) -> Image.Image:
    """The picture under the colours of its mask, and below it the names and shares of what is in
    it, the largest first; at most `MOST_SIDE` pixels a side above the names."""
    scale = min(1.0, MOST_SIDE / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    pixels = np.asarray(picture.convert("RGB").resize(size), np.float32)
    labels = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    cover = np.where(labels == BACKGROUND, 0, np.float32(COVER))[..., None]
    mixed = pixels + cover * (palette()[labels] - pixels)
    out = Image.fromarray(mixed.round().astype(np.uint8))
    shares = np.bincount(mask.ravel(), minlength=256) / mask.size
    return _with_names(out, shares, class_names)


def framed(
    picture: Image.Image, boxes: Sequence[ScoredBox], class_names: Sequence[str]
) -> Image.Image:
    """The picture with a frame around each box, its name and score in per cent within; at most
    `MOST_SIDE` pixels a side. The best are drawn last, over the others."""
    scale = min(1.0, MOST_SIDE / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    out, font, colours = (
        picture.convert("RGB").resize(size),
        ImageFont.load_default(FONT),
        palette(),
    )
    draw = ImageDraw.Draw(out)
    for found in reversed(boxes):
        left, top, width, height = (scale * value for value in found.box)
        colour = tuple(colours[1 + (found.label - 1) % 255].tolist())
        draw.rectangle((left, top, left + width, top + height), outline=colour, width=3)
        text = f"{class_names[found.label - 1]} {100 * found.score:.0f}%"
        draw.rectangle(draw.textbbox((left + 3, top + 3), text, font), fill=colour)
        draw.text((left + 3, top + 3), text, font=font, fill="white")
    return out


def _with_names(
    picture: Image.Image, shares: np.ndarray, class_names: Sequence[str]
) -> Image.Image:
    font, colours = ImageFont.load_default(FONT), palette()
    entries, width = [], max(picture.width, 240)
    x = y = 0
    for label in np.argsort(-shares, kind="stable"):
        if label != BACKGROUND and shares[label]:
            text = f"{class_names[label - 1]} {100 * shares[label]:.1f}%"
            needs = LINE + round(font.getlength(text)) + GAP
            if x and x + needs > width:
                x, y = 0, y + LINE
            entries.append((x, y, text, tuple(colours[label].tolist())))
            x += needs
    sheet = Image.new("RGB", (width, picture.height + (y + LINE if entries else 0)), "white")
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for x, y, text, colour in entries:
        top = picture.height + y
        draw.rectangle((x + 4, top + 5, x + LINE - 6, top + LINE - 5), fill=colour)
        draw.text((x + LINE, top + 3), text, font=font, fill="#1a1a1a")
    return sheet
