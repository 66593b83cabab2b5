"""The agreement of routers against ranks counted in plain Python."""

import pytest
import torch
from evaluated import LAYERS, batches, model_of

from dmoe.config.base import ConfigError
from dmoe.evaluation import router_agreement
from dmoe.evaluation.agreement import rank_agreement
from dmoe.models import ModelInputs


def agreement_by_hand(logits: list[float], other: list[float], top: int) -> float:
    """Define `rank_agreement` for one token: Pearson's correlation of the ranks."""

    def order(values: list[float]) -> list[int]:
        return sorted(range(len(values)), key=lambda e: (-values[e], e))

    both = sorted({*order(logits)[:top], *order(other)[:top]})
    if len(both) == 1:
        return 1.0
    ranks = [
        [sorted(both, key=lambda e: (-v[e], e)).index(e) for e in both] for v in (logits, other)
    ]
    means = [sum(r) / len(r) for r in ranks]
    cross = sum((a - means[0]) * (b - means[1]) for a, b in zip(*ranks, strict=True))
    squares = [sum((r - m) ** 2 for r in rs) for rs, m in zip(ranks, means, strict=True)]
    return cross / (squares[0] * squares[1]) ** 0.5


@pytest.mark.parametrize("top", range(1, 7))
def test_equals_the_ranks_counted_by_hand(top: int) -> None:
    generator = torch.Generator().manual_seed(top)
    # Few different values, so that there are ties.
    logits_TE, other_TE = torch.randint(0, 5, (2, 200, 6), generator=generator).double()
    expected = [
        agreement_by_hand(a, b, top)
        for a, b in zip(logits_TE.tolist(), other_TE.tolist(), strict=True)
    ]
    assert min(expected) < 0 < max(expected)
    assert rank_agreement(logits_TE, other_TE, top).tolist() == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    """Order 0 1 2 against 1 0 2 and then 2 1 0; with one of them, 0 against 1."""
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert rank_agreement(logits, torch.tensor([[2.0, 3.0, 1.0]]), 3).item() == 0.5
    assert rank_agreement(logits, torch.tensor([[1.0, 2.0, 3.0]]), 3).item() == -1
    assert rank_agreement(logits, torch.tensor([[2.0, 3.0, 1.0]]), 1).item() == -1
    assert rank_agreement(logits, logits, 1).item() == 1


def test_the_first_layer_agrees_and_later_ones_less() -> None:
    agreement = router_agreement(model_of(), batches(), 1, 3)
    assert len(agreement) == LAYERS
    assert agreement[0] == 1
    assert all(-1 <= value < 1 for value in agreement[1:])


def test_at_the_same_k_all_layers_agree() -> None:
    assert router_agreement(model_of(), batches(), 2, 2) == (1,) * LAYERS


@pytest.mark.parametrize(("k", "other_k", "top"), [(1, 3, None), (2, [1, 4, 1], None), (1, 2, 4)])
def test_equals_a_loop_over_tokens(k, other_k, top) -> None:
    """Each window alone and without padding, whatever the micro-batches are."""
    model, sums, num_tokens = model_of(), [0.0] * LAYERS, 0
    at_both = zip(model.config.k_of_layers(k), model.config.k_of_layers(other_k), strict=True)
    tops = [top or max(pair) for pair in at_both]
    for batch in batches():
        for row in range(len(batch.tokens_BS)):
            valid = batch.valid_BS[row]
            if not valid.any():
                continue
            inputs = ModelInputs(
                batch.tokens_BS[row, valid][None],
                batch.positions_BS[row, valid][None],
                batch.document_ids_BS[row, valid][None],
            )
            logits = [logits_of(model, inputs, at) for at in (k, other_k)]
            num_tokens += int(valid.sum())
            for layer in range(LAYERS):
                pairs = zip(logits[0][layer], logits[1][layer], strict=True)
                sums[layer] += sum(agreement_by_hand(a, b, tops[layer]) for a, b in pairs)
    expected = [value / num_tokens for value in sums]
    for size in (1, 2, 5):
        found = router_agreement(model, batches(size), k, other_k, top=top)
        assert found == pytest.approx(expected, abs=1e-9)


def logits_of(model, inputs: ModelInputs, k) -> list[list[list[float]]]:
    """Return the logits of every layer from the rows that its gate scores."""
    seen: list[list[list[float]]] = []
    hooks = [
        layer.router.gate.register_forward_hook(lambda _m, _x, out: seen.append(out.tolist()))
        for layer in model.moe_layers
    ]
    with torch.no_grad(), model.at_k(k):
        model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_leaves_no_trace() -> None:
    model = model_of()
    model.set_k(3)
    router_agreement(model, batches(), 1, 2)
    assert not any(layer.router._forward_hooks for layer in model.moe_layers)
    with torch.no_grad():
        output = model(ModelInputs(batches()[0].tokens_BS))
    num_tokens = batches()[0].tokens_BS.numel()
    assert {int(layer.stats.counts_E.sum()) for layer in output.moe} == {3 * num_tokens}


@pytest.mark.parametrize("bad", [{"k": 0}, {"other_k": 5}, {"top": 5}, {"k": [1, 2]}])
def test_what_the_model_cannot_do_is_refused(bad) -> None:
    with pytest.raises(ConfigError, match="k = "):
        router_agreement(model_of(), batches(), **{"k": 1, "other_k": 2, **bad})


def test_no_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        router_agreement(model_of(), [], 1, 2)
