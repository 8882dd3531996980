"""What the down-sampling costs, against the published figures."""

import pytest

from benchmarks.segmentation import BASELINE, CASES, PUBLISHED, mmsegmentation_count, multiply_adds, start_error


def test_rank_1_has_the_published_cost() -> None:
    plain, conv3, conv5 = (multiply_adds(options)[0] for options in CASES[:3])
    assert conv5 - conv3 == pytest.approx(PUBLISHED["conv5"] - PUBLISHED["conv3"], abs=0.01)
    assert conv3 == pytest.approx(PUBLISHED["conv3"], rel=0.003)
    # 9 multiply-adds for each of the three embeddings' outputs.
    outputs = 160 * 128 * 256 + 320 * 64 * 128 + 640 * 32 * 64
    assert conv3 - plain == pytest.approx(9 * outputs / 1e9, abs=1e-6)


def test_the_baseline_has_the_published_cost() -> None:
    """Decoder, its width, what is counted and what is not are those of the paper."""
    assert round(mmsegmentation_count(BASELINE), 2) == PUBLISHED[BASELINE]


def test_the_rest_of_the_published_cost_is_more_than_layers_between_the_two_convolutions_would_explain() -> None:
    """So that the published cost does not tell whether the paper has a BatchNorm or ReLU there."""
    rest = PUBLISHED["conv3"] - mmsegmentation_count("RepMLPNet-D256", deploy=True, **CASES[1])
    between = 160 * 256 * 512 + 320 * 128 * 256 + 640 * 64 * 128  # outputs of the 1x1 convolutions
    assert rest == pytest.approx(5.21, abs=0.01)
    assert rest > 10 * 3 * between / 1e9  # two operations an element for BatchNorm, one for ReLU


def test_the_error_of_the_start_falls_to_rounding_with_the_rank() -> None:
    errors = [start_error(80, 160, rank) for rank in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert 0.7 < errors[0] < 0.9
    assert errors[3] < 1e-6
