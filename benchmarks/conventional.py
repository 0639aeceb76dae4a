"""The conventional pipeline of distillation code, the baseline of the benchmarks.

The workers of a DataLoader pass each sample, a PIL image, through torchvision's transforms. The
step computes in float32, channels first and eager, with each method as the published code writes
it. It copies its losses and accuracies to the host. The networks are those of the suite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sskd.data import Images
from sskd.methods.adapters import ProjectionHead
from sskd.methods.networks import probe_features

NEGATIVES = 16_384
DIMENSION = 128
CONTRAST_TEMPERATURE = 0.07
MOMENTUM = 0.5
QUARTER_TURNS = 4
EPS = 1e-7


class Samples(Dataset):
    """The images of a dataset one by one: ``(image [3, S, S], label, position)``."""

    def __init__(self, images: Images, *, train: bool) -> None:
        split = images.train if train else images.test
        self.pixels = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels: list[int] = split.labels.tolist()
        side = images.image_size
        self.to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
        )
        self.crop = transforms.RandomCrop(side, padding=4)
        self.flip = transforms.RandomHorizontalFlip()
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        image = Image.fromarray(self.pixels[position])
        if self.train:
            image = self.flip(self.crop(image))
        return self.to_tensor(image), self.labels[position], position


class ContrastSamples(Samples):
    """Adds to each sample the positions of its m negatives, drawn from other classes on the host.

    The third item holds 1 + m positions: the sample first, then its negatives.
    """

    def __init__(self, images: Images, *, train: bool) -> None:
        super().__init__(images, train=train)
        labels = np.array(self.labels)
        self.others = [np.flatnonzero(labels != label) for label in range(images.num_classes)]

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        image, label, _ = super().__getitem__(position)
        others = self.others[label]
        count = min(NEGATIVES, len(others))
        negatives = np.random.choice(others, count, replace=False)  # as the published code
        return image, label, np.hstack([[position], negatives])


class RotatedSamples(Samples):
    """Four views of each sample [4, 3, S, S], each turned and cropped, all or none flipped."""

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        image = self.flip(Image.fromarray(self.pixels[position]))
        turned = [image.rotate(90 * turns) for turns in range(QUARTER_TURNS)]
        views = torch.stack([self.to_tensor(self.crop(view)) for view in turned])
        return views, self.labels[position], position


class Conventional:
    """The training of a network with cross-entropy; subclasses are the methods."""

    samples: type[Samples] = Samples

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Images,
        *,
        batch_size: int,
        workers: int,
    ) -> None:
        self.device = images.train.images.device
        self.student, self.teacher = student.to(self.device), teacher.to(self.device)
        self.modules = [self.student]
        self.prepare(images)
        self.teacher.eval()
        self.student.train()
        parameters = [each for module in self.modules for each in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.loader = loader_of(self.samples(images, train=True), batch_size, workers)
        self.batches: Iterator[Any] = iter(())
        self.metrics: list[float] = []

    def prepare(self, images: Images) -> None:
        """Add the modules and state of a method."""

    def draw(self) -> list[Tensor]:
        """Return the next batch's images, labels and positions, on the device."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return [each.to(self.device, non_blocking=True) for each in batch]

    def train(self, batch: list[Tensor]) -> None:
        """Take a step and copy its metrics to the host."""
        terms, logits = self.loss(*batch)
        loss = torch.stack(terms).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        top5 = logits.topk(5, dim=1).indices == batch[1][:, None]
        metrics = [loss, *terms, top5[:, 0].float().mean(), top5.any(1).float().mean()]
        self.metrics = [metric.item() for metric in metrics]

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the weighted terms and the logits [B, C]."""
        logits = self.student(x).logits
        return [F.cross_entropy(logits, y)], logits


class ConventionalKD(Conventional):
    """Cross-entropy, and the divergence from the softened predictions of the teacher."""

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return both terms and the logits [B, C]."""
        with torch.no_grad():
            target = self.teacher(x).logits
        logits = self.student(x).logits
        return [0.1 * F.cross_entropy(logits, y), 0.9 * softened_kl(logits, target, 4.0)], logits


class ConventionalCRD(Conventional):
    """KD and CRD, which gathers the rows of the negatives from the banks, [B, 1 + m, d]."""

    samples = ContrastSamples

    def prepare(self, images: Images) -> None:
        """Add an embedding and a bank for each network."""
        count = len(images.train)
        both = (self.student, self.teacher)
        widths = [probe_features(each, images).pooled.shape[1] for each in both]
        self.embeddings = [nn.Linear(width, DIMENSION).to(self.device) for width in widths]
        bound = (DIMENSION / 3) ** -0.5
        shape = count, DIMENSION
        self.banks = [torch.empty(shape, device=self.device).uniform_(-bound, bound) for _ in "12"]
        self.z = [0.0, 0.0]
        self.modules += self.embeddings

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return three terms and the logits [B, C]."""
        with torch.no_grad():
            teacher = self.teacher(x)
        student = self.student(x)
        pooled = (student.pooled, teacher.pooled)
        student_rows, teacher_rows = (
            F.normalize(embedding(feature), dim=1)
            for embedding, feature in zip(self.embeddings, pooled, strict=True)
        )
        contrast = self.contrast(student_rows, 1, index) + self.contrast(teacher_rows, 0, index)
        self.update(0, student_rows, index[:, 0])
        self.update(1, teacher_rows, index[:, 0])
        kd = softened_kl(student.logits, teacher.logits, 4.0)
        terms = [F.cross_entropy(student.logits, y), kd, 0.8 * contrast]
        return terms, student.logits

    def contrast(self, embedding: Tensor, bank: int, index: Tensor) -> Tensor:
        """Return the loss of ``embedding`` [B, d] against rows [B, 1 + m] of a bank."""
        rows = self.banks[bank].index_select(0, index.flatten()).view(*index.shape, DIMENSION)
        scores = torch.bmm(rows, embedding[:, :, None])[:, :, 0].div(CONTRAST_TEMPERATURE).exp()
        count = len(self.banks[bank])
        if self.z[bank] == 0:
            self.z[bank] = scores.mean().item() * count
        scores = scores / self.z[bank]
        noise = (index.shape[1] - 1) / count
        log_h_positive = (scores[:, 0] / (scores[:, 0] + noise + EPS)).log()
        log_1mh_negative = (noise / (scores[:, 1:] + noise + EPS)).log().sum(1)
        return -(log_h_positive + log_1mh_negative).mean()

    @torch.no_grad()
    def update(self, bank: int, embedding: Tensor, rows: Tensor) -> None:
        """Move ``rows`` [B] of a bank towards ``embedding`` [B, d]."""
        updated = MOMENTUM * self.banks[bank][rows] + (1 - MOMENTUM) * embedding
        self.banks[bank].index_copy_(0, rows, F.normalize(updated, dim=1))


class ConventionalSSKD(Conventional):
    """SSKD, with similarities by expansion to [3B, d, B], and the kept rows as indices."""

    samples = RotatedSamples

    def prepare(self, images: Images) -> None:
        """Add a projection head to each network."""
        student, teacher = (
            ProjectionHead(probe_features(each, images).pooled.shape[1]).to(self.device)
            for each in (self.student, self.teacher)
        )
        self.student_head, self.teacher_head = student, teacher
        self.modules.append(student)

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return four terms and the logits [B, C] of the normal views."""
        size, views = x.shape[:2]
        flat = x.view(-1, *x.shape[2:])
        normal = torch.arange(views * size, device=self.device) % views == 0
        student = self.student(flat)
        scores = self.similarity(self.student_head(student.pooled), normal)
        with torch.no_grad():
            teacher = self.teacher(flat)
            teacher_scores = self.similarity(self.teacher_head(teacher.pooled), normal)
        positives = torch.arange(size, device=self.device).repeat_interleave(views - 1)
        truth = y.repeat_interleave(views - 1)
        rotated, teacher_rotated = student.logits[~normal], teacher.logits[~normal]
        keep_tf = kept_rows(teacher_rotated, truth, 1.0)
        keep_ss = kept_rows(teacher_scores, positives, 0.75)
        terms = [
            0.1 * F.cross_entropy(student.logits[normal], y),
            0.9 * softened_kl(student.logits[normal], teacher.logits[normal], 4.0),
            2.7 * softened_kl(rotated[keep_tf], teacher_rotated[keep_tf], 4.0),
            10.0 * softened_kl(scores[keep_ss], teacher_scores[keep_ss], 0.5),
        ]
        return terms, student.logits[normal]

    @staticmethod
    def similarity(projected: Tensor, normal: Tensor) -> Tensor:
        """Return the cosines [3B, B] of the rotated rows of [4B, d] to the normal ones."""
        rotated, upright = projected[~normal], projected[normal]
        wide = rotated[:, :, None].expand(-1, -1, len(upright))
        return F.cosine_similarity(wide, upright.T[None].expand(len(rotated), -1, -1), dim=1)


CONVENTIONAL: dict[str, type[Conventional]] = {
    "vanilla": Conventional,
    "kd": ConventionalKD,
    "crd": ConventionalCRD,
    "sskd": ConventionalSSKD,
}


def baseline_device(name: str) -> torch.device:
    """Return the device called ``name``, with cuDNN's benchmark mode on, as is usual."""
    torch.backends.cudnn.benchmark = True
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def softened_kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of softened logits [N, C], times the squared temperature."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.softmax(target / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2


def kept_rows(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Return the indices of the rows that selective transfer keeps, of scores [N, C].

    It keeps all rows in which ``target`` [N] ranks first, and the best ``ratio`` of the others.
    """
    order = scores.sort(dim=1, descending=True).indices
    rank = (order == target[:, None]).nonzero()[:, 1]
    correct = int((rank == 0).sum().item())
    return rank.argsort()[: correct + int((len(rank) - correct) * ratio)]


def loader_of(samples: Samples, batch_size: int, workers: int) -> DataLoader:
    """Return a loader with worker processes and, for a GPU, pinned memory."""
    return DataLoader(
        samples,
        batch_size,
        shuffle=samples.train,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Return the top-1 accuracy in percent."""
    network.eval()
    correct = 0.0
    for x, y, _ in loader:
        logits = network(x.to(device, non_blocking=True)).logits
        correct += (logits.argmax(1) == y.to(device, non_blocking=True)).sum().item()
    return 100 * correct / len(loader.dataset)  # type: ignore[arg-type]
