// Places things over the picture that an <img> shows whole.

export const isWhole = ([left, top, right, bottom]) => left === 0 && top === 0 && right === 1 && bottom === 1;

// box: the part of the picture that is covered, [left, top, right, bottom] from 0 to 1.
export function layOver(element, image, box = [0, 0, 1, 1]) {
  const { left, top, width, height } = placeOf(image);
  element.style.left = `${left + box[0] * width}px`;
  element.style.top = `${top + box[1] * height}px`;
  element.style.width = `${(box[2] - box[0]) * width}px`;
  element.style.height = `${(box[3] - box[1]) * height}px`;
}

// Where the picture lies, in pixels from the corner of what positions the <img>, whose object-fit is
// contain.
export function placeOf(image) {
  const style = getComputedStyle(image);
  const [up, right, down, left] = ["Top", "Right", "Bottom", "Left"].map((side) => parseFloat(style[`padding${side}`]));
  const room = { width: image.clientWidth - left - right, height: image.clientHeight - up - down };
  const { naturalWidth = 1, naturalHeight = 1 } = image;
  const scale = Math.min(room.width / naturalWidth, room.height / naturalHeight);
  const width = naturalWidth * scale;
  const height = naturalHeight * scale;
  return {
    left: image.offsetLeft + left + (room.width - width) / 2,
    top: image.offsetTop + up + (room.height - height) / 2,
    width,
    height,
  };
}
