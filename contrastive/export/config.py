"""The formats of a whole model, without the libraries they come from."""

from typing import Literal

ModelFormat = Literal["open_clip", "transformers", "onnx"]
