"""Networks of timm in their forms."""

import pytest
import torch

from benchmarks.peers import peer_forms


@pytest.mark.slow
def test_forms() -> None:
    forms = peer_forms("resmlp_12_224")
    assert list(forms) == ["as it comes", "channels-last"]
    with torch.no_grad():
        assert forms["as it comes"](torch.randn(1, 3, 224, 224)).abs().max() > 0
