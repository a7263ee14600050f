"""A model at one patch size as two ONNX files, an image tower and a text tower.

Both give unit-norm embeddings for batches of any size; config.json beside them says what they
expect.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive.export.projection import affine
from contrastive.export.timm import timm_net
from contrastive.files.transformers import first_line
from contrastive.model.lit import LitModel
from contrastive.text.open_clip import check_tokenizer
from contrastive.text.padding import PaddedTokens, pad_tokens
from contrastive.text.tower import TextTower
from contrastive.text.transformers import HFTextTower
from data.errors import UsageError
from data.token_ids import TokenIds

OPSET = 17  # the first with LayerNormalization
USAGE = """`config.json` names the files, their inputs and the opset, and says what pixels are
expected: the shorter side resized to `image_size` by bicubic and the middle cut out (`fit` crop),
or both sides resized to it (squash); then (pixel / 255 - mean) / std.
`tokenizer.json` makes the token ids, cut at `context_length`; embeddings have unit norm."""


class _Image(nn.Module):
    def __init__(self, model: LitModel, patch_size: int) -> None:
        super().__init__()
        self.net = timm_net(model.vision, patch_size, projected=True)
        self.mean, self.whiten = affine(model)
        self.head = model.head

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.net.forward_head(self.net.forward_features(pixel_values), pre_logits=True)
        whitened = (features - self.mean) @ self.whiten
        return F.normalize(whitened, dim=-1) if self.head is None else self.head(whitened)


class _Text(nn.Module):
    def __init__(self, model: LitModel) -> None:
        super().__init__()
        self.encoder = model.text.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vectors = self.encoder.tower([PaddedTokens(input_ids, mask)])
        return F.normalize(self.encoder.project(vectors), dim=-1)


def write_onnx(model: LitModel, patch_size: int, folder: Path, home: Path) -> None:
    """Write image_pN.onnx, text.onnx, the tokenizer, and config.json."""
    tower, size = model.text.encoder.tower, model.image_size
    check_tokenizer(tower, "onnx")
    image_file = f"image_p{patch_size}.onnx"
    pixels = torch.zeros(2, 3, size, size)
    _export(_Image(model, patch_size), {"pixel_values": pixels}, {0: "batch"}, folder / image_file)
    tokens = _tokens(tower, ["two dogs", "a red bicycle"])
    inputs, axes = {"input_ids": tokens.ids}, {0: "batch"}
    if isinstance(tower, HFTextTower) and not tower.reads_padding:
        inputs["attention_mask"] = tokens.mask
        axes[1] = "length"
    names = _export(_Text(model), inputs, axes, folder / "text.onnx")
    tower.save_tokenizer(folder)
    bias = model.text.logit_bias if model.text.loss.kind == "sigmoid" else None
    config = {
        "format": 1,
        "opset": OPSET,
        "patch_size": patch_size,
        "image_size": size,
        "fit": model.transform.fit,
        "mean": model.vision.mean,
        "std": model.vision.std,
        "context_length": tower.tokenizer.context_length,
        "pad_id": tower.tokenizer.pad_id,
        "logit_scale": float(model.text.scale()),
        "logit_bias": None if bias is None else float(bias),
        "image": {"file": image_file, "inputs": ["pixel_values"], "output": "image_embeds"},
        "text": {
            "file": "text.onnx",
            "inputs": names,
            "output": "text_embeds",
            "length": None if 1 in axes else tokens.ids.shape[1],  # None: any
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tokens(tower: TextTower, texts: list[str]) -> PaddedTokens:
    """Token ids padded to the longest text; for open_clip to its context, the only length that its
    trace supports."""
    ids = TokenIds.of(tower.tokenizer(texts))
    if isinstance(tower, HFTextTower):
        return tower.pad(ids)
    return pad_tokens(ids, tower.tokenizer.context_length, tower.tokenizer.pad_id)


def _export(
    net: nn.Module, inputs: dict[str, Tensor], axes: dict[int, str], file: Path
) -> list[str]:
    """Write a file and return the names of its inputs: torch leaves out what is never read."""
    output = "text_embeds" if "input_ids" in inputs else "image_embeds"
    with warnings.catch_warnings():
        # torch's newer exporter needs onnxscript; a trace warns of every shape it takes as constant
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                net.eval(),
                tuple(inputs.values()),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[output],
                dynamic_axes=dict.fromkeys(inputs, axes) | {output: {0: "batch"}},
            )
        except RuntimeError as error:
            raise UsageError(
                f"onnx cannot express what gives {output}: {first_line(error)}; try transformers"
            ) from error
    return [given.name for given in _session(file).get_inputs()]


def _session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "what is exported to onnx is checked with onnxruntime; run: pip install onnxruntime"
        ) from error
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def read_onnx(model: LitModel, folder: Path) -> tuple[Any, Any]:
    """(encode_image, encode_text) of the folder under onnxruntime, texts by our tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    tower = model.text.encoder.tower

    def run(part: str, *inputs: Tensor) -> Tensor:
        session = _session(folder / config[part]["file"])
        named = zip(config[part]["inputs"], (i.numpy() for i in inputs), strict=False)
        return torch.from_numpy(session.run(None, dict(named))[0])

    def encode_text(texts: list[str]) -> Tensor:
        tokens = _tokens(tower, texts)
        return run("text", tokens.ids, tokens.mask)

    return lambda images: run("image", images), encode_text
