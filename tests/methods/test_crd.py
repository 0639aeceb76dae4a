"""CRD's losses and memories, compared with loops in float64, and the distribution of its draws."""

from __future__ import annotations

import copy
import itertools
import math
from statistics import fmean

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods import Networks, Outputs
from sskd.methods.crd import CRD, ContrastMemory, draw_negatives, nce_loss, score
from sskd.models import build_model

EQUAL, UNEQUAL = [12] * 5, [50, 1, 7, 2]


def labels_of(sizes: list[int]) -> Tensor:
    """Return shuffled labels of classes with these ``sizes``."""
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def others_of(labels: Tensor, label: int) -> list[int]:
    return [image for image, other in enumerate(labels.tolist()) if other != label]


@pytest.mark.parametrize("count", [1, 5, 10])
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
def test_negatives_are_of_other_classes_without_repeats(sizes: list[int], count: int) -> None:
    torch.manual_seed(0)
    labels = labels_of(sizes)
    negatives = draw_negatives(labels, labels, count)
    assert (negatives.shape, negatives.dtype) == ((len(labels), count), torch.int64)
    for label, row in zip(labels.tolist(), negatives.tolist(), strict=True):
        assert len(set(row)) == count
        assert set(row) <= set(others_of(labels, label))


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, [1, 1]])
def test_the_largest_count_draws_all_other_images(sizes: list[int]) -> None:
    torch.manual_seed(0)
    labels = labels_of(sizes)
    largest = torch.full((20,), sizes.index(max(sizes)))
    others = others_of(labels, int(largest[0]))
    for row in draw_negatives(labels, largest, len(others)).tolist():
        assert sorted(row) == others


@pytest.mark.parametrize("label", [0, 3])
@pytest.mark.parametrize(("sizes", "count"), [(EQUAL, 1), (EQUAL, 30), (UNEQUAL, 2), (UNEQUAL, 7)])
def test_negatives_are_uniform(sizes: list[int], count: int, label: int) -> None:
    """Pearson's chi-squared test.

    Each of E images is in a row with p = count / E; the covariance of two of them, drawn without
    replacement, is -p(1 - p)/(E - 1). So the squared deviations from ``rows * p``, over
    ``rows * p(1 - p) * E/(E - 1)``, sum to a chi-squared variable with E - 1 degrees of freedom.
    A true draw fails with p = 2e-5 (too uneven, or too even to be independent).
    """
    torch.manual_seed(1)
    labels, rows = labels_of(sizes), 4000
    others = others_of(labels, label)
    drawn = draw_negatives(labels, torch.full((rows,), label), count).flatten().tolist()
    chance = count / len(others)
    spread = rows * chance * (1 - chance) * len(others) / (len(others) - 1)
    statistic = sum((drawn.count(image) - rows * chance) ** 2 for image in others) / spread
    assert 1e-5 < chi2.sf(statistic, len(others) - 1) < 1 - 1e-5


@pytest.mark.parametrize("classes", [(0, 0), (0, 1)])
def test_draws_of_two_samples_are_independent(classes: tuple[int, int]) -> None:
    """Adjacent rows share as many images as independent draws do, within 5 standard deviations.

    A row of ``count`` out of E images holds a given one with p = count / E and a given pair with
    q = p (count - 1) / (E - 1). So of the S images that both rows may hold, independent rows share
    S p^2 in the mean, with a variance of S p^2 (1 - p^2) + S (S - 1) (q^2 - p^4).
    """
    torch.manual_seed(2)
    labels, pairs, count = labels_of(EQUAL), 2000, 16
    rows = draw_negatives(labels, torch.tensor(classes).repeat(pairs), count).tolist()
    shared = [len(set(a) & set(b)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    eligible = len(labels) - EQUAL[0]
    shareable = len(labels) - sum(EQUAL[label] for label in set(classes))
    one = count / eligible
    pair = one * (count - 1) / (eligible - 1)
    variance = shareable * (one**2 - one**4) + shareable * (shareable - 1) * (pair**2 - one**4)
    assert abs(fmean(shared) - shareable * one**2) < 5 * math.sqrt(variance / pairs)
    assert len({tuple(sorted(row)) for row in rows}) == len(rows)


def nce_by_hand(scores: list[list[float]], num_data: int) -> float:
    losses = []
    for positive, *negatives in scores:
        noise = len(negatives) / num_data
        loss = -math.log(positive / (positive + noise + 1e-7))
        for negative in negatives:
            loss -= math.log(noise / (negative + noise + 1e-7))
        losses.append(loss)
    return fmean(losses)


@pytest.mark.parametrize(("batch", "negatives", "num_data"), [(1, 1, 2), (4, 9, 50), (7, 64, 70)])
def test_nce_loss_equals_loops(batch: int, negatives: int, num_data: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    scores = torch.randn(batch, 1 + negatives, generator=generator).exp()
    expected = nce_by_hand(scores.tolist(), num_data)
    assert nce_loss(scores, num_data).item() == pytest.approx(expected, rel=1e-5)


def test_nce_loss_is_finite_for_extreme_scores() -> None:
    # From the farthest to the nearest cosine at a temperature of 0.07.
    extremes = [math.exp(-1 / 0.07), 1.0, math.exp(1 / 0.07)]
    scores = torch.tensor(list(itertools.product(extremes, repeat=3)), requires_grad=True)
    loss = nce_loss(scores, 50_000)
    assert loss.item() == pytest.approx(nce_by_hand(scores.tolist(), 50_000), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert (gradient[:, 0] <= 0).all()  # 0 if the noise is below float32's resolution
    assert (gradient[:, 1:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_and_loss_are_float32_for_any_input(dtype: torch.dtype) -> None:
    embedding, bank, index = unit_rows(3, 8), unit_rows(20, 8, seed=1), positions(3, 5, 20)
    embedding, bank = embedding.to(dtype), bank.to(dtype)
    scores = score(embedding.float(), bank.float(), index, 0.07)
    loss = nce_loss(scores.to(dtype).float(), 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = score(embedding, bank, index, 0.07), nce_loss(scores.to(dtype), 20)
    outside = score(embedding, bank, index, 0.07), nce_loss(scores.to(dtype), 20)
    for found_scores, found_loss in (inside, outside):
        assert (found_scores.dtype, found_loss.dtype) == (torch.float32, torch.float32)
        assert torch.equal(found_scores, scores)
        assert torch.equal(found_loss, loss)


def unit_rows(count: int, dimension: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(noise, dim=1)


def positions(batch: int, count: int, num_data: int, seed: int = 0) -> Tensor:
    """Return [batch, count] positions, distinct within each row and within the first column."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(num_data, generator=generator)[:batch].tolist()
    rows = [torch.randperm(num_data, generator=generator).tolist() for _ in first]
    pairs = zip(first, rows, strict=True)
    return torch.tensor([[image, *[i for i in row if i != image]][:count] for image, row in pairs])


def scores_by_hand(embedding: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Return the exponentials at a temperature of 0.07 from gathered rows, in float64."""
    rows = bank.double()[index]
    return torch.exp((rows * embedding.double()[:, None]).sum(2) / 0.07)


def contrast_by_hand(embedding: Tensor, bank: Tensor, index: Tensor, normaliser: float) -> Tensor:
    scores = scores_by_hand(embedding, bank, index) / normaliser
    noise = (index.shape[1] - 1) / len(bank)
    others = torch.full_like(scores, noise)
    others[:, 0] = scores[:, 0]
    terms: Tensor = others.log() - (scores + noise + 1e-7).log()
    return -terms.sum() / len(scores)


def normaliser_by_hand(embedding: Tensor, bank: Tensor, index: Tensor) -> float:
    return len(bank) * fmean(scores_by_hand(embedding, bank, index).flatten().tolist())


SIZES = [(1, 4, 10, 3), (5, 8, 30, 20), (12, 128, 200, 150)]


@pytest.mark.parametrize(("batch", "dimension", "num_data", "count"), SIZES)
def test_gradient_equals_gathered_rows(
    batch: int, dimension: int, num_data: int, count: int
) -> None:
    embedding = unit_rows(batch, dimension).requires_grad_()
    bank, index = unit_rows(num_data, dimension, seed=1), positions(batch, count, num_data)
    constant = 3.0 * num_data
    loss = nce_loss(score(embedding, bank, index, 0.07) / constant, num_data)
    expected = contrast_by_hand(embedding, bank, index, constant)
    assert_same_with_gradient(loss, expected, embedding)


@pytest.mark.parametrize(("batch", "dimension", "num_data", "count"), SIZES)
def test_the_first_batch_sets_the_normaliser(
    batch: int, dimension: int, num_data: int, count: int
) -> None:
    torch.manual_seed(0)
    memory, other = ContrastMemory(6, dimension, num_data), ContrastMemory(9, dimension, num_data)
    first, index = unit_rows(batch, dimension).requires_grad_(), positions(batch, count, num_data)
    loss = memory.contrast(first, other, index, 0.07)
    normaliser = normaliser_by_hand(first, other.bank, index)
    assert memory.normaliser.item() == pytest.approx(normaliser, rel=1e-5)
    assert other.normaliser == 0  # each direction has its constant
    assert_same_with_gradient(loss, contrast_by_hand(first, other.bank, index, normaliser), first)
    kept = memory.normaliser.clone()
    second = unit_rows(batch, dimension, seed=2).requires_grad_()
    again = positions(batch, count, num_data, seed=2)
    assert normaliser_by_hand(second, other.bank, again) != pytest.approx(normaliser, rel=0.01)
    loss = memory.contrast(second, other, again, 0.07)
    assert torch.equal(memory.normaliser, kept)
    assert_same_with_gradient(loss, contrast_by_hand(second, other.bank, again, normaliser), second)


def assert_same_with_gradient(found: Tensor, expected: Tensor, leaf: Tensor) -> None:
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(found, leaf),
        torch.autograd.grad(expected, leaf),
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_gradient_descent_lowers_the_loss() -> None:
    torch.manual_seed(8)
    memory, other, index = ContrastMemory(6, 8, 30), ContrastMemory(9, 8, 30), positions(5, 20, 30)
    pooled = torch.randn(5, 6)
    losses = []
    for _ in range(21):
        pooled = pooled.detach().requires_grad_()
        loss = memory.contrast(memory(pooled), other, index, 0.07)
        losses.append(loss.item())
        pooled = pooled - 0.05 * torch.autograd.grad(loss, pooled)[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("features", [torch.zeros(5, 6), torch.ones(5, 6), torch.zeros(1, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_degenerate_features_give_finite_gradients(features: Tensor, bias: bool) -> None:
    torch.manual_seed(9)
    memory, other = ContrastMemory(6, 8, 30), ContrastMemory(9, 8, 30)
    if not bias:
        memory.linear.bias.data.zero_()
    index = positions(len(features), 20, 30)
    pooled = features.clone().requires_grad_()
    loss = memory.contrast(memory(pooled), other, index, 0.07)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, [pooled, *memory.parameters()]):
        assert gradient.isfinite().all()


def test_the_initial_bank_is_uniform() -> None:
    """Within five standard deviations of the moments of +-a, a = 1/sqrt(d/3).

    The variance of the entries is a^2/3 = 1/d, of their squares a^4/5 - a^4/9. The largest of N
    is below ``(1 - x) a`` with a probability of exp(-x N/2): 3e-7 at x = 30/N.
    """
    torch.manual_seed(3)
    entries = ContrastMemory(5, 128, 1000).bank.double()
    bound, number = 1 / math.sqrt(128 / 3), entries.numel()
    assert entries.shape == (1000, 128)
    for extreme in (entries.max().item(), -entries.min().item()):
        assert bound * (1 - 30 / number) < extreme <= bound * (1 + 1e-7)
    assert abs(entries.mean().item()) < 5 * math.sqrt(1 / 128 / number)
    spread = bound**2 * math.sqrt(4 / 45 / number)
    assert abs(entries.square().mean().item() - 1 / 128) < 5 * spread


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_update_changes_only_the_rows_of_the_batch(momentum: float) -> None:
    torch.manual_seed(4)
    memory = ContrastMemory(5, 16, 40)
    kept = memory.bank.clone()
    index = [31, 2, 17, 8]
    embedding = unit_rows(4, 16).requires_grad_()
    memory.update(embedding, torch.tensor(index), momentum)
    assert not memory.bank.requires_grad
    for image in set(range(40)) - set(index):
        assert torch.equal(memory.bank[image], kept[image])
    for image, new in zip(index, embedding.tolist(), strict=True):
        mixed = [
            momentum * a + (1 - momentum) * b
            for a, b in zip(kept[image].tolist(), new, strict=True)
        ]
        length = math.hypot(*mixed)
        assert memory.bank[image].tolist() == pytest.approx([m / length for m in mixed], abs=1e-6)
        assert math.hypot(*memory.bank[image].tolist()) == pytest.approx(1, abs=1e-6)


def test_the_last_embedding_of_an_image_that_a_batch_has_twice_counts() -> None:
    torch.manual_seed(4)
    memory = ContrastMemory(5, 16, 40)
    alone = copy.deepcopy(memory)
    embedding = unit_rows(5, 16)
    memory.update(embedding, torch.tensor([31, 2, 31, 8, 2]), 0.5)
    alone.update(embedding[2:], torch.tensor([31, 8, 2]), 0.5)
    assert torch.equal(memory.bank, alone.bank)


def test_embeddings_are_float32_unit_vectors_in_autocast() -> None:
    torch.manual_seed(5)
    memory = ContrastMemory(6, 16, 10)
    pooled = 30 * torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = memory(pooled)
    assert inside.dtype == torch.float32
    assert inside.norm(dim=1).tolist() == pytest.approx([1.0] * 7, abs=1e-6)
    weight, bias = (p.tolist() for p in memory.linear.parameters())
    for row, values in zip(memory(pooled).tolist(), pooled.tolist(), strict=True):
        mapped = [
            b + sum(x * y for x, y in zip(w, values, strict=True))
            for w, b in zip(weight, bias, strict=True)
        ]
        assert row == pytest.approx([m / math.hypot(*mapped) for m in mapped], abs=1e-5)


def test_both_losses_use_the_banks_before_the_update(few_images: Images) -> None:
    torch.manual_seed(6)
    networks = build_model("resnet8", 5).eval(), build_model("resnet14", 5).eval()
    method = CRD(
        Networks(*networks, few_images), dimension=8, negatives=20, contrast_temperature=0.07,
        momentum=0.5, temperature=4.0, weights={"ce": 1.0, "kd": 1.0, "crd": 1.0},
    )  # fmt: skip
    memories = method.student_memory, method.teacher_memory
    index = torch.tensor([4, 39, 11])
    labels = few_images.train.labels[index]
    batch = Batch(torch.randn(3, 3, 32, 32), labels, index, crops=torch.zeros(3).long())
    features = [network(batch.x) for network in networks]
    for _ in range(2):
        banks = [memory.bank.clone() for memory in memories]
        torch.manual_seed(7)
        negatives = draw_negatives(few_images.train.labels, batch.y, 20)
        columns = torch.cat([index[:, None], negatives], dim=1)
        torch.manual_seed(7)
        loss = method.feature_terms(Outputs(features[0], features[1], batch))["crd"]
        embeddings = [m(f.pooled) for m, f in zip(memories, features, strict=True)]
        expected = sum(
            contrast_by_hand(embedding, bank, columns, memory.normaliser.item()).item()
            for embedding, bank, memory in zip(embeddings, banks[::-1], memories, strict=True)
        )
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert all(torch.equal(m.bank, bank) for m, bank in zip(memories, banks, strict=True))
        method.after_step()
        for memory, bank, embedding in zip(memories, banks, embeddings, strict=True):
            updated = nn.functional.normalize(0.5 * bank[index] + 0.5 * embedding, dim=1)
            torch.testing.assert_close(memory.bank[index], updated)
