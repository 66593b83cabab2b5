import pytest
import torch
from pydantic import ValidationError

from dmoe.generation import SamplingConfig, next_probs, sample_next
from dmoe.generation.sampling import draws

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 2.0, 1.0, 0.0]]).log_softmax(-1)
PROBS = LOGITS.exp()[0]


def probs(logits=LOGITS, **options) -> torch.Tensor:
    return next_probs(logits, SamplingConfig(**options))[0]


def sample(logits, num: int, **options) -> torch.Tensor:
    """Draw `num` times with evenly spaced uniform numbers, which cover [0, 1) exactly."""
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return sample_next(logits.expand(num, -1), uniform, SamplingConfig(**options))


def test_plain_sampling_is_the_softmax():
    assert probs() == pytest.approx(PROBS)
    counts = torch.bincount(sample(LOGITS, 1000), minlength=6)
    # Six thresholds among 1000 even steps: each count is off by less than one at either end.
    assert ((counts - 1000 * PROBS).abs() <= 1).all()


def test_temperature_divides_the_logits():
    assert probs(temperature=0.5) == pytest.approx((LOGITS[0] / 0.5).softmax(-1))


@pytest.mark.parametrize("temperature", [0, 1e-30])
def test_no_temperature_is_greedy_and_ties_go_to_the_lowest_id(temperature):
    kept = probs(temperature=temperature)
    assert kept.isfinite().all()
    if temperature == 0:
        assert kept.tolist() == [0, 1, 0, 0, 0, 0]
        assert sample(LOGITS, 9, temperature=0).tolist() == [1] * 9
    else:
        assert kept.tolist() == [0, 0.5, 0, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (6, range(6)), (99, range(6))]
)
def test_top_k_keeps_k_and_breaks_ties_by_id(k, kept):
    result = probs(top_k=k)
    assert result.nonzero().flatten().tolist() == list(kept)
    assert result[list(kept)] == pytest.approx(PROBS[list(kept)] / PROBS[list(kept)].sum())


def test_many_ties_go_to_the_lowest_ids():
    assert probs(torch.zeros(1, 5000), top_k=3).nonzero().flatten().tolist() == [0, 1, 2]
    assert probs(torch.zeros(1, 4096), top_p=3 / 4096).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [0.01, 0.2, 0.5, 0.64, 0.8, 0.95, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    order = PROBS.sort(descending=True, stable=True).indices.tolist()
    expected: list[int] = []
    while sum(PROBS[i].item() for i in expected) < top_p:
        expected.append(order[len(expected)])
    result = probs(top_p=top_p)
    assert result.nonzero().flatten().tolist() == sorted(expected)
    assert result.sum() == pytest.approx(1)


def test_top_p_counts_within_top_k():
    """Of the two best, equally probable, one alone has half of what is left."""
    assert probs(top_k=2, top_p=0.5).nonzero().flatten().tolist() == [1]


def test_no_draw_leaves_the_set():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(top_k=50)
    allowed = next_probs(logits, config)[0] > 0
    uniform = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for scale in (1, 1000):
        tokens = sample_next(logits.expand(4, -1) * scale, uniform, config)
        assert allowed[tokens].all()


def test_the_tail_of_a_large_vocabulary_is_drawn():
    """One token holds nearly all; a float32 sum of the rest would stay where it is."""
    logits = torch.zeros(1, 100_000)
    logits[0, 0] = 30.0
    tail = 99_999 / (99_999 + torch.tensor(30.0, dtype=torch.float64).exp())
    uniform = 1 - tail[None] / 2
    token = sample_next(logits, uniform, SamplingConfig())
    assert 49_000 < token.item() < 51_000


def test_half_precision_logits_are_widened():
    assert next_probs(LOGITS.bfloat16(), SamplingConfig()).dtype == torch.float32
    assert next_probs(LOGITS.double(), SamplingConfig()).dtype == torch.float64


def test_draws_follow_the_prompt_and_not_the_batch():
    config = SamplingConfig(max_new_tokens=5, seed=3)
    alone = draws(["b"], config)
    batch = draws(["a", "b", "b"], config)
    assert batch[1].equal(alone[0])
    assert not batch[2].equal(batch[1])
    assert not batch[0].equal(batch[1])
    longer = SamplingConfig(max_new_tokens=9, seed=3)
    assert draws(["b"], longer)[:, :5].equal(alone)
    assert not draws(["b"], SamplingConfig(max_new_tokens=5, seed=4)).equal(alone)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"stop": ["a", ""]},
        {"topk": 3},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValidationError):
        SamplingConfig(**options)
