"""The losses of features, compared with loops in float64 and the properties in the papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sskd.methods.ab import ab_loss
from sskd.methods.at import at_loss
from sskd.methods.cc import cc_loss
from sskd.methods.fitnet import hint_loss
from sskd.methods.fsp import fsp_loss
from sskd.methods.ft import ft_loss
from sskd.methods.nst import nst_loss
from sskd.methods.pkt import pkt_loss
from sskd.methods.rkd import rkd_loss
from sskd.methods.sp import sp_loss
from sskd.methods.vid import Gaussian, vid_loss

Shape = tuple[int, ...]
Row = list[float]


def dot(first: Row, second: Row) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def unit(row: Row) -> Row:
    length = math.sqrt(dot(row, row))
    return [value / length for value in row]


def squares(first: Row, second: Row) -> Row:
    return [(a - b) ** 2 for a, b in zip(first, second, strict=True)]


def pooled(channel: list[Row], size: int) -> Row:
    """Return one channel's map, average-pooled to ``size`` x ``size``, row by row."""
    ratio = len(channel) // size
    return [
        fmean(channel[ratio * y + i][ratio * x + j] for i in range(ratio) for j in range(ratio))
        for y in range(size)
        for x in range(size)
    ]


def both_pooled(first: Tensor, second: Tensor) -> list[list[list[Row]]]:
    """Return both maps as [B][c][positions], pooled to the positions of the smaller one."""
    size = min(len(first[0][0]), len(second[0][0]))
    return [
        [[pooled(channel, size) for channel in image] for image in maps.tolist()]
        for maps in (first, second)
    ]


def hint_by_hand(student: Tensor, teacher: Tensor) -> float:
    return fmean(squares(student.flatten().tolist(), teacher.flatten().tolist()))


def attention_by_hand(image: list[Row]) -> Row:
    return unit([fmean(value**2 for value in position) for position in zip(*image, strict=True)])


def attention_differences(student: Tensor, teacher: Tensor) -> Row:
    differences = []
    for images in zip(*both_pooled(student, teacher), strict=True):
        differences += [a - b for a, b in zip(*map(attention_by_hand, images), strict=True)]
    return differences


def at_by_hand(student: Tensor, teacher: Tensor) -> float:
    return fmean(difference**2 for difference in attention_differences(student, teacher))


def ft_by_hand(student: Tensor, teacher: Tensor) -> float:
    return fmean(abs(difference) for difference in attention_differences(student, teacher))


def sp_by_hand(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for image, other in zip(student, teacher, strict=True):
        student_row = unit([dot(image.flatten().tolist(), x.flatten().tolist()) for x in student])
        teacher_row = unit([dot(other.flatten().tolist(), x.flatten().tolist()) for x in teacher])
        total += sum(squares(student_row, teacher_row))
    return total / len(student) ** 2


def vid_by_hand(mean: Tensor, target: Tensor, variance: Tensor) -> float:
    terms = []
    for image, channel, y, x in itertools.product(*map(range, mean.shape)):
        spread = variance[channel].item()
        error = mean[image, channel, y, x].item() - target[image, channel, y, x].item()
        terms.append(0.5 * (error**2 / spread + math.log(spread)))
    return fmean(terms)


def smooth_l1(difference: float) -> float:
    size = abs(difference)
    return size**2 / 2 if size < 1 else size - 0.5


def distances_by_hand(features: Tensor) -> Row:
    pairs = [math.dist(a, b) for a, b in itertools.product(features.tolist(), repeat=2)]
    mean = fmean(pair for pair in pairs if pair > 0)
    return [pair / mean for pair in pairs]


def angles_by_hand(features: Tensor) -> Row:
    """Return the cosines at the first of each triplet, by the law of cosines."""
    cosines = []
    for a, b, c in itertools.product(features.tolist(), repeat=3):
        one, two, opposite = math.dist(a, b), math.dist(a, c), math.dist(b, c)
        sides = 2 * one * two
        cosines.append((one**2 + two**2 - opposite**2) / sides if sides else 0.0)
    return cosines


def rkd_by_hand(
    student: Tensor, teacher: Tensor, distance_weight: float = 25, angle_weight: float = 50
) -> float:
    total = 0.0
    for weight, relation in ((distance_weight, distances_by_hand), (angle_weight, angles_by_hand)):
        both = zip(relation(student), relation(teacher), strict=True)
        total += weight * fmean(smooth_l1(s - t) for s, t in both)
    return total


def pkt_by_hand(student: Tensor, teacher: Tensor) -> float:
    terms = []
    for i in range(len(student)):
        affinities = [
            [(dot(unit(rows[i]), unit(row)) + 1) / 2 for row in rows]
            for rows in (student.tolist(), teacher.tolist())
        ]
        for s, t in zip(*affinities, strict=True):
            p_s, p_t = s / sum(affinities[0]), t / sum(affinities[1])
            terms.append(p_t * math.log((p_t + 1e-7) / (p_s + 1e-7)))
    return fmean(terms)


def ab_by_hand(student: Tensor, teacher: Tensor, margin: float = 1) -> float:
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total / len(student) * 3 / 1000


def cc_by_hand(student: Tensor, teacher: Tensor) -> float:
    gaps = [
        [abs(a - b) for a, b in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return fmean(dot(before, after) for before, after in itertools.pairwise(gaps))


def nst_by_hand(student: Tensor, teacher: Tensor) -> float:
    images = list(zip(*both_pooled(student, teacher), strict=True))

    def kernel(first: int, second: int) -> float:
        return fmean(
            dot(unit(a), unit(b)) ** 2 for pair in images for a in pair[first] for b in pair[second]
        )

    return kernel(1, 1) + kernel(0, 0) - 2 * kernel(0, 1)


def flow_by_hand(lower: Tensor, upper: Tensor) -> Row:
    flow = []
    for below, above in zip(*both_pooled(lower, upper), strict=True):
        flow += [dot(a, b) / len(a) for a in below for b in above]
    return flow


def fsp_by_hand(
    student_lower: Tensor, student_upper: Tensor, teacher_lower: Tensor, teacher_upper: Tensor
) -> float:
    teacher_flow = flow_by_hand(teacher_lower, teacher_upper)
    return fmean(squares(flow_by_hand(student_lower, student_upper), teacher_flow))


class Case(NamedTuple):
    """A loss, its value by loops, and shapes of its inputs.

    The first ``students`` inputs are the student's. With step size ``step``, gradient descent
    lowers the loss.
    """

    loss: Callable[..., Tensor]
    by_hand: Callable[..., float]
    shapes: list[tuple[Shape, ...]]
    step: float
    students: int = 1


SAME_MAPS: list[tuple[Shape, ...]] = [((n, c, s, s),) * 2 for n, c, s in [(4, 3, 4), (2, 5, 3)]]
SAME_MAPS.append(((3, 2, 8, 8), (3, 2, 8, 8)))
ANY_MAPS: list[tuple[Shape, ...]] = [
    ((4, 3, 4, 4), (4, 5, 4, 4)),
    ((3, 2, 8, 8), (3, 4, 2, 2)),
    ((2, 4, 3, 3), (2, 2, 6, 6)),
    ((2, 1, 2, 2), (2, 3, 8, 8)),
    ((3, 7, 2, 2), (3, 6, 4, 4)),  # more channels than places
]
ANY_ROWS: list[tuple[Shape, ...]] = [((6, 4), (6, 7)), ((3, 9), (3, 2)), ((9, 16), (9, 16))]
CASES = {
    "hint": Case(hint_loss, hint_by_hand, SAME_MAPS, 10),
    "at": Case(at_loss, at_by_hand, ANY_MAPS, 10),
    "sp": Case(
        sp_loss,
        sp_by_hand,
        [((4, 3, 4, 4), (4, 5, 2, 2)), ((6, 2, 3, 3), (6, 2, 3, 3)), ((3, 7, 1, 1), (3, 1, 5, 5))],
        1,
    ),
    "vid": Case(vid_loss, vid_by_hand, [(*maps, maps[0][1:2]) for maps in SAME_MAPS], 5),
    "rkd": Case(rkd_loss, rkd_by_hand, ANY_ROWS, 0.01),
    "pkt": Case(pkt_loss, pkt_by_hand, ANY_ROWS, 5),
    "ab": Case(ab_loss, ab_by_hand, SAME_MAPS, 50),
    "ft": Case(ft_loss, ft_by_hand, ANY_MAPS, 0.1),
    "cc": Case(cc_loss, cc_by_hand, [((6, 4),) * 2, ((2, 9),) * 2, ((9, 3),) * 2], 0.01),
    "nst": Case(nst_loss, nst_by_hand, ANY_MAPS, 1),
    "fsp": Case(
        fsp_loss,
        fsp_by_hand,
        [
            ((4, 3, 4, 4), (4, 5, 4, 4), (4, 3, 4, 4), (4, 5, 4, 4)),
            ((3, 2, 8, 8), (3, 4, 2, 2), (3, 2, 8, 8), (3, 4, 4, 4)),
            ((2, 4, 3, 3), (2, 2, 6, 6), (2, 4, 4, 4), (2, 2, 2, 2)),
        ],
        0.5,
        students=2,
    ),
}
EVERY_SHAPE = [(name, shapes) for name, case in CASES.items() for shapes in case.shapes]


def draw(shapes: tuple[Shape, ...], seed: int = 0) -> list[Tensor]:
    """Return Gaussian inputs of ``shapes``; inputs of one dimension are positive variances."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [values.abs() + 0.5 if values.ndim == 1 else values for values in drawn]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("name", "shapes"), EVERY_SHAPE)
def test_loss_equals_loops(name: str, shapes: tuple[Shape, ...], repeated: bool) -> None:
    inputs = draw(shapes)
    if repeated:
        inputs[0][1] = inputs[0][0]
    expected = CASES[name].by_hand(*inputs)
    assert CASES[name].loss(*inputs).item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (2, 5)])
def test_rkd_weighs_distances_and_angles(weights: tuple[float, float]) -> None:
    student, teacher = draw(((7, 4), (7, 3)))
    expected = rkd_by_hand(student, teacher, *weights)
    assert rkd_loss(student, teacher, *weights).item() == pytest.approx(expected, rel=1e-5)


def test_pkt_accepts_a_probability_of_zero() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    equal = torch.ones(2, 2)
    # Each of two rows: half log(half / 1) and half log(half / 1e-7).
    expected = (0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-7)) / 2
    assert pkt_loss(opposite, equal).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("margin", [0.5, 1, 2])
def test_ab_loss_ends_at_the_margin(margin: float) -> None:
    student, noise = draw(((3, 4, 5, 5),) * 2, seed=1)
    teacher = noise.round()  # contains zeros, which are not active
    assert (teacher == 0).any()
    expected = ab_by_hand(student, teacher, margin)
    assert ab_loss(student, teacher, margin).item() == pytest.approx(expected, rel=1e-5)
    beyond = torch.where(teacher > 0, margin + noise.abs(), -margin - noise.abs())
    assert ab_loss(beyond, teacher, margin).item() == 0
    beyond[0, 0, 0, 0] *= 0.25 * margin / beyond[0, 0, 0, 0].abs()
    short = 3 / 1000 * (0.75 * margin) ** 2 / 3
    assert ab_loss(beyond, teacher, margin).item() == pytest.approx(short, rel=1e-5)


@pytest.mark.parametrize("name", ["hint", "at", "sp", "rkd", "pkt", "ft", "cc", "nst", "fsp"])
def test_loss_is_zero_for_equal_features(name: str) -> None:
    case = CASES[name]
    features = draw(case.shapes[0][: case.students])
    assert case.loss(*features, *features).item() == pytest.approx(0, abs=1e-7)


def test_vid_is_smallest_at_target_and_error_variance() -> None:
    mean, target, variance = draw(CASES["vid"].shapes[0])
    least = vid_loss(target, target, variance)
    assert least.item() == pytest.approx(fmean(math.log(v) / 2 for v in variance.tolist()))
    for seed in range(20):
        (noise,) = draw((target.shape,), seed)
        assert vid_loss(target + 0.1 * noise, target, variance) > least
    errors = (mean - target).square().mean((0, 2, 3))
    likeliest = vid_loss(mean, target, errors)
    for channel, factor in itertools.product(range(len(errors)), (0.8, 1.25)):
        other = errors.clone()
        other[channel] *= factor
        assert vid_loss(mean, target, other) > likeliest


def mean_by_hand(position: Row, weights: list[list[Row]]) -> Row:
    *hidden, last = weights
    for weight in hidden:
        position = [max(dot(row, position), 0.0) for row in weight]
    return [dot(row, position) for row in last]


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [((3, 2), (4, 8)), ((2, 8), (3, 2)), ((5, 3), (6, 3))]
)
@pytest.mark.parametrize("raw", [None, -2.0])
def test_gaussian_equals_loops_and_trains_all_parameters(
    student_size: tuple[int, int], teacher_size: tuple[int, int], raw: float | None
) -> None:
    torch.manual_seed(0)
    gaussian = Gaussian(student_size[0], teacher_size[0], 5.0, 1e-5)
    *kernels, raw_variance = sorted(gaussian.parameters(), key=lambda p: -p.ndim)
    weights = [kernel.flatten(1).tolist() for kernel in kernels]
    assert [len(weight) for weight in weights] == [teacher_size[0]] * 3
    assert raw_variance.shape == (teacher_size[0],)
    variance = 5.0
    if raw is not None:
        variance = math.log1p(math.exp(raw)) + 1e-5
        raw_variance.data.fill_(raw)
    student, teacher = draw(tuple((2, c, size, size) for c, size in (student_size, teacher_size)))
    terms = []
    for student_map, teacher_map in zip(*both_pooled(student, teacher), strict=True):
        positions = zip(zip(*student_map, strict=True), zip(*teacher_map, strict=True), strict=True)
        for position, target in positions:
            errors = squares(mean_by_hand(list(position), weights), list(target))
            terms += [0.5 * (error / variance + math.log(variance)) for error in errors]
    loss = gaussian(student, teacher)
    assert loss.item() == pytest.approx(fmean(terms), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in gaussian.parameters())


@pytest.mark.parametrize(("name", "shapes"), EVERY_SHAPE)
def test_gradient_descent_lowers_the_loss(name: str, shapes: tuple[Shape, ...]) -> None:
    case = CASES[name]
    inputs = draw(shapes)
    students, others = inputs[: case.students], inputs[case.students :]
    losses = []
    for _ in range(21):
        students = [each.detach().requires_grad_() for each in students]
        loss = case.loss(*students, *others)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, students)
        students = [s - case.step * g for s, g in zip(students, gradients, strict=True)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses


def scaled(values: Tensor) -> Tensor:
    return 3.7 * values


def shifted(values: Tensor) -> Tensor:
    return values + draw((values.shape[1:],), seed=6)[0]


def rotated(values: Tensor) -> Tensor:
    """Rotate the samples by an orthogonal matrix."""
    rows = values.flatten(1)
    (noise,) = draw(((rows.shape[1],) * 2,), seed=7)
    return (rows @ torch.linalg.qr(noise).Q).view_as(values)


def stretched(values: Tensor) -> Tensor:
    """Multiply each sample by another number."""
    return torch.linspace(0.3, 4.0, len(values))[:, None] * values


def shuffled(maps: Tensor) -> Tensor:
    """Reverse the order of the channels."""
    return maps.flip(1)


INVARIANT = [
    ("at", scaled), ("at", shuffled), ("ft", scaled), ("sp", scaled), ("sp", rotated),
    ("rkd", scaled), ("rkd", rotated), ("rkd", shifted), ("pkt", rotated), ("pkt", stretched),
    ("nst", shuffled), ("nst", scaled),
]  # fmt: skip


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(("name", "change"), INVARIANT)
def test_loss_is_invariant(name: str, change: Callable[[Tensor], Tensor], position: int) -> None:
    for shapes in CASES[name].shapes:
        inputs = draw(shapes)
        before = CASES[name].loss(*inputs).item()
        inputs[position] = change(inputs[position])
        assert CASES[name].loss(*inputs).item() == pytest.approx(before, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_float32_for_any_input(name: str, dtype: torch.dtype) -> None:
    # Large enough that squares and sums overflow in float16.
    inputs = [(100 * values).to(dtype) for values in draw(CASES[name].shapes[0])]
    expected = CASES[name].loss(*(values.float() for values in inputs))
    assert expected.isfinite()
    outside = CASES[name].loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = CASES[name].loss(*inputs)
    for found in (inside, outside):
        assert (found.dtype, found.shape) == (torch.float32, ())
        assert torch.equal(found, expected)


def first_two_equal(values: Tensor) -> Tensor:
    return torch.cat([values[:1], values[:1], values[2:]])


def all_equal(values: Tensor) -> Tensor:
    return values[:1].expand_as(values)


def one_zero(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[:1]), values[1:]])


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("change", [first_two_equal, all_equal, one_zero, torch.zeros_like])
@pytest.mark.parametrize("name", CASES)
def test_degenerate_features_give_finite_gradients(
    name: str, change: Callable[[Tensor], Tensor], who: str
) -> None:
    case = CASES[name]
    inputs = draw(case.shapes[0])
    for i, values in enumerate(inputs):
        owner = "student" if i < case.students else "teacher"
        if who in (owner, "both") and values.ndim > 1:
            inputs[i] = change(values)
    assert_finite(case, inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one_gives_finite_gradients(name: str) -> None:
    inputs = draw(CASES[name].shapes[0])
    assert_finite(CASES[name], [values[:1] if values.ndim > 1 else values for values in inputs])


def assert_finite(case: Case, inputs: list[Tensor]) -> None:
    inputs = [values.detach().clone() for values in inputs]
    students = [values.requires_grad_() for values in inputs[: case.students]]
    loss = case.loss(*inputs)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, students):
        assert gradient.isfinite().all()


def test_rkd_gradient_is_bounded_for_equal_samples() -> None:
    student, teacher = draw(((6, 5), (6, 5)))
    student = first_two_equal(student).requires_grad_()
    (gradient,) = torch.autograd.grad(rkd_loss(student, teacher), student)
    assert gradient.abs().max() < 100


@pytest.mark.parametrize(("name", "loss"), [("sp", sp_loss), ("pkt", pkt_loss), ("rkd", rkd_loss)])
def test_gradient_is_bounded_for_a_sample_of_zeros(name: str, loss: Callable[..., Tensor]) -> None:
    student, teacher = draw(((6, 5), (6, 5)))

    def largest(rows: Tensor) -> float:
        rows = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(rows, teacher), rows)
        return gradient.abs().max().item()

    usual = largest(student)
    student[2] = 0
    assert largest(student) < 100 * usual
