"""The methods that need a classifier: their losses against loops, and what SimKD deploys."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Compose, SmallTeacher
from faults import SMALL
from torch import Tensor, nn

from sskd.config import Config
from sskd.data import Images, eval_batches, load_images
from sskd.errors import UserError
from sskd.evaluate.evaluation import Options, evaluate
from sskd.evaluate.render import first_line
from sskd.methods import Outputs, build_method, state_without_teacher
from sskd.methods.cat_kd import cat_loss, class_activation_maps
from sskd.methods.networks import classifier_of
from sskd.methods.simkd import Projector, SimKD, simkd_loss
from sskd.methods.srrl import SRRL
from sskd.models import Features, build_model, load_weights, read_checkpoint, weights_digest
from sskd.runs.folder import write_config_file
from sskd.runs.identity import full_config
from sskd.teachers.assembly import assemble
from sskd.train import train
from sskd.trained import TrainedNetwork
from sskd.training.acceleration import fold_teacher

# Parameters of the projector: 32, 32 and 64 channels behind the 64 of resnet8.
LAYERS = 64 * 32 + 32 * 32 * 9 + 32 * 64 + 2 * (32 + 32 + 64)
FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "ResNet50", "MobileNetV2", "ShuffleV1", "ShuffleV2"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_maps_the_pooled_feature_to_the_logits(
    name: str, few_images: Images
) -> None:
    with torch.device("meta"):
        network = build_model(name, 5)
        classifier = classifier_of(network, few_images)
        pooled = network(torch.empty(1, 3, 32, 32)).pooled
    assert (classifier.in_features, classifier.out_features) == (pooled.shape[1], 5)


def test_a_network_without_a_linear_classifier_is_refused(few_images: Images) -> None:
    class Headless(nn.Module):
        """A network whose logits are the first entries of its pooled feature."""

        def __init__(self) -> None:
            super().__init__()
            self.network = build_model("resnet8", 5)

        def forward(self, x: Tensor) -> Features:
            features: Features = self.network(x)
            return features._replace(logits=features.pooled[:, :5])

    with pytest.raises(UserError, match="Headless has none; choose networks"):
        classifier_of(Headless(), few_images)


def pool(maps: Tensor, size: int) -> list[float]:
    """Average-pool a square map whose side is a multiple of ``size``."""
    step = len(maps) // size
    blocks = maps.double().unfold(0, step, step).unfold(1, step, step)
    return [float(block.mean()) for block in blocks.reshape(size * size, -1)]


@pytest.mark.parametrize("normalise", [False, True])
def test_cat_loss_equals_loops(normalise: bool) -> None:
    student, teacher = noise(2, 3, 4, 4), noise(2, 3, 8, 8, seed=1)
    total = 0.0
    for one, other in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        a, b = pool(one, 2), pool(other, 2)
        if normalise:
            a, b = ([x / math.sqrt(sum(y * y for y in row)) for x in row] for row in (a, b))
        total += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    found = cat_loss(student, teacher, 2, normalise=normalise)
    assert found.item() == pytest.approx(total / (2 * 3 * 4), rel=1e-5)


def test_normalised_maps_forget_their_scale() -> None:
    student, teacher = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    once, scaled = (
        cat_loss(factor * student, teacher, 2, normalise=True).item() for factor in (1, 9)
    )
    assert scaled == pytest.approx(once, rel=1e-5)
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    cat_loss(zeros, teacher, 2, normalise=True).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_the_mean_of_an_activation_map_is_the_logit_without_the_bias() -> None:
    classifier, last_map = nn.Linear(6, 4), noise(2, 6, 3, 3)
    maps = class_activation_maps(classifier, last_map)
    expected = classifier(last_map.mean(dim=(2, 3))) - classifier.bias
    torch.testing.assert_close(maps.mean(dim=(2, 3)), expected)


def test_simkd_loss_pools_the_teacher() -> None:
    student, teacher = noise(1, 2, 2, 2), noise(1, 2, 4, 4, seed=1)
    total = 0.0
    for one, other in zip(student[0], teacher[0], strict=True):
        pairs = zip(one.flatten().tolist(), pool(other, 2), strict=True)
        total += sum((x - y) ** 2 for x, y in pairs)
    assert simkd_loss(student, teacher).item() == pytest.approx(total / 8, rel=1e-5)
    assert simkd_loss(teacher, teacher).item() == 0


def networks(images: Images) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return build_model("resnet8", images.num_classes), build_model("resnet14", images.num_classes)


def test_srrl_is_zero_for_the_teachers_own_feature(composed: Compose, few_images: Images) -> None:
    method = build_method(composed("method=srrl").method, *networks(few_images), few_images)
    assert isinstance(method, SRRL)
    method.connector = nn.Sequential(nn.Identity())
    x = noise(3, 3, 32, 32)
    with torch.no_grad():
        teacher = method.eval().teacher(x)
        batch = None
        terms = method.feature_terms(Outputs(teacher, teacher, batch))  # type: ignore[arg-type]
        other = method.feature_terms(
            Outputs(teacher._replace(pooled=teacher.pooled + 1), teacher, batch)  # type: ignore[arg-type]
        )
    assert terms["feature"].item() == 0
    assert terms["regression"].item() == pytest.approx(0, abs=1e-10)
    assert other["feature"].item() == pytest.approx(1, rel=1e-5)
    weight = classifier_of(method.teacher, few_images).weight.double()
    sums = weight.sum(1)
    assert other["regression"].item() == pytest.approx(sums.square().mean().item(), rel=1e-4)


def test_simkd_deploys_the_teachers_classifier(composed: Compose, few_images: Images) -> None:
    student, teacher = networks(few_images)
    own = sum(p.numel() for p in student.parameters())
    classifier = teacher.get_submodule("fc")
    method = build_method(composed("method=simkd").method, student, teacher, few_images)
    assert isinstance(method, SimKD)
    deployed = method.deployed.eval()
    assert method.deployed is deployed
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        projected = method.projector(student(x).last_map)
        expected = classifier(projected.mean(dim=(2, 3)))
        torch.testing.assert_close(deployed(x).logits, expected)
    # resnet8 without its own classifier, the projector, and the teacher's classifier.
    classes = few_images.num_classes
    fc = 64 * classes + classes
    assert sum(p.numel() for p in deployed.parameters()) == own - fc + LAYERS + fc


def test_the_projector_pools_a_larger_map_of_the_student() -> None:
    last_map, teacher = noise(2, 3, 8, 8), noise(2, 6, 4, 4, seed=1)
    projector = Projector(last_map, teacher, 2).eval()
    pooled = torch.tensor([pool(each, 4) for each in last_map.flatten(0, 1)])
    torch.testing.assert_close(projector(last_map), projector.layers(pooled.view(2, 3, 4, 4)))
    assert projector(noise(2, 3, 2, 2)).shape == (2, 6, 2, 2)


def test_the_folded_teacher_has_the_deployed_classifier(
    composed: Compose, few_images: Images
) -> None:
    method = build_method(composed("method=simkd").method, *networks(few_images), few_images)
    assert isinstance(method, SimKD)
    fold_teacher(method)
    assert isinstance(method.teacher, torch.fx.GraphModule)
    assert method.deployed.get_submodule("classifier") is method.teacher.get_submodule("fc")
    # A checkpoint has the state of the method beside that of the deployed network.
    parts = {name.partition(".")[0] for name in state_without_teacher(method)}
    assert parts == {"student", "projector"}


def save_fitted(config: Config, folder: Path) -> None:
    """Save what SimKD deploys like a run, with a classifier that knows the test set by heart."""
    images = load_images(config.dataset)
    deployed = assemble(config, images).deployed.eval()
    batches = eval_batches(images.test, images.mean, images.std, 64)
    with torch.no_grad():
        pooled = torch.cat([deployed(x).pooled for x, _ in batches])
        centred = pooled - pooled.mean(0)
        one_hot = nn.functional.one_hot(images.test.labels).float()
        weight = torch.linalg.lstsq(centred, one_hot - one_hot.mean(0), driver="gelsd").solution
        classifier = deployed.get_submodule("classifier")
        assert isinstance(classifier, nn.Linear)
        classifier.weight.copy_(weight.T)
        classifier.bias.copy_(-pooled.mean(0) @ weight)
    folder.mkdir()
    torch.save({"model": deployed.state_dict(), "accuracy": 99.5}, folder / "best.pt")
    write_config_file(folder / "config.yaml", full_config(config, "0" * 64))


def test_the_deployed_network_is_evaluated(composed: Compose, tmp_path: Path) -> None:
    config, folder = composed(*SMALL, "method=simkd", "method.reduction=4"), tmp_path / "run"
    save_fitted(config, folder)
    options = Options(device="cpu", repeats=0)
    line = first_line(evaluate(TrainedNetwork(folder), options))
    assert line.endswith(
        "best.pt: resnet8 as method=simkd deploys it, digits test set: top-1 100.00 "
        "(the file states 99.50)"
    )
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("reduction: 4", "reduction: ${oc.env:HOME}"))
    with pytest.raises(UserError, match="are not plain values"):
        evaluate(TrainedNetwork(folder), options)
    with pytest.raises(UserError, match="does not fit"):
        load_weights(build_model("resnet8", 10), folder / "best.pt")


def test_a_run_saves_what_it_deploys(
    composed: Compose, tmp_path: Path, small_teacher: SmallTeacher
) -> None:
    small_teacher.put(tmp_path / "runs")
    fast = ("method=simkd", "schedule.epochs=1", "teacher.epochs=3")
    result = train(composed(*SMALL, *fast, "dataset.fraction=0.014"))
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("simkd/*/result.json"))
    own = sum(p.numel() for p in build_model("resnet8", 10).parameters())
    assert result.parameters == own + LAYERS
    for name, digest in (
        ("model.safetensors", result.digest.last),
        ("best.pt", result.digest.best),
    ):
        state = read_checkpoint(folder / name, lambda state: "projector.layers.0.weight" in state)
        assert weights_digest(state.state) == digest
