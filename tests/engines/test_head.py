"""The output head never copies its weight, tied or not."""

import torch
from torch import nn

from twinweight.engines.head import OutputHead


def test_a_slice_of_the_last_token_is_one_plain_product() -> None:
    head = OutputHead(64, 96, bias=False).bfloat16()
    hidden = torch.randn(2, 5, 64).bfloat16()
    last = hidden[:, -1:, :]
    with torch.inference_mode(), torch.profiler.profile() as profile:
        out = head(last)
    assert not {"aten::bmm", "aten::baddbmm"} & {event.name for event in profile.events()}
    assert torch.equal(out, nn.functional.linear(last.contiguous().view(2, 64), head.weight).view(2, 1, 96))
    assert head(hidden).shape == (2, 5, 96)
