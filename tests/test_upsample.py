"""Maps at a picture's own resolution: torch's bilinear resize, in bands."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retrieval.dense import upsample


@pytest.mark.parametrize("shape", [(64, 64), (9, 50), (4, 3), (1, 7)])
@pytest.mark.parametrize("band", [1, 10_000_000])
def test_bands_are_the_rows_of_torchs_bilinear_resize(shape, band, monkeypatch):
    monkeypatch.setattr(upsample, "BAND", band)
    values = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    batch = torch.from_numpy(values).permute(2, 0, 1)[None]
    expected = F.interpolate(batch, shape, mode="bilinear")[0]
    bands = list(upsample.upsampled(values, shape))
    assert len(bands) == (shape[0] if band == 1 else 1)
    found = torch.cat([band for _, band in bands], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
