"""The pipeline that distillation code bases have in common, as an opponent for the suite's.

A PIL image a sample, through torchvision's transforms in the workers of a DataLoader; float32,
channels first, eager; the teacher's and the method's sums as their papers' code writes them; and
each step's losses and accuracies copied to the host. The networks are the suite's own.
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
SMALLEST = 1e-7


class Samples(Dataset):
    """A dataset's images one by one: ``(image [3, S, S], label, position)``."""

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
    """Each sample with its negatives' positions [m], drawn from other classes on the host."""

    def __init__(self, images: Images, *, train: bool) -> None:
        super().__init__(images, train=train)
        labels = np.array(self.labels)
        self.others = [np.flatnonzero(labels != label) for label in range(images.num_classes)]

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        image, label, _ = super().__getitem__(position)
        others = self.others[label]
        count = min(NEGATIVES, len(others))
        negatives = np.random.choice(others, count, replace=False)  # as they do
        return image, label, np.hstack([[position], negatives])


class RotatedSamples(Samples):
    """Four views of each sample [4, 3, S, S]: flipped alike, a quarter turn and a crop each."""

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        image = self.flip(Image.fromarray(self.pixels[position]))
        turned = [image.rotate(90 * turns) for turns in range(QUARTER_TURNS)]
        views = torch.stack([self.to_tensor(self.crop(view)) for view in turned])
        return views, self.labels[position], position


class Conventional:
    """A network in training, one step after the other; subclasses are the methods."""

    samples: type[Samples] = Samples

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Images,
        batch_size: int,
        workers: int,
    ) -> None:
        self.device = images.train.images.device
        self.student, self.teacher = student.to(self.device), teacher.to(self.device)
        self.modules = [self.student]
        self.prepare(images)
        self.teacher.eval()
        self.student.train()  # last, for a network alone is its own teacher here
        parameters = [each for module in self.modules for each in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.loader = loader_of(self.samples(images, train=True), batch_size, workers)
        self.batches: Iterator[Any] = iter(())
        self.last: list[float] = []

    def prepare(self, images: Images) -> None:
        """Add what a method has beside the networks."""

    def draw(self) -> list[Tensor]:
        """Return the next batch's images, labels and positions, on the device."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return [each.to(self.device, non_blocking=True) for each in batch]

    def learn(self, batch: list[Tensor]) -> None:
        """Take a step, and copy its figures to the host."""
        terms, logits = self.loss(*batch)
        loss = torch.stack(terms).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        top5 = logits.topk(5, dim=1).indices == batch[1][:, None]
        figures = [loss, *terms, top5[:, 0].float().mean(), top5.any(1).float().mean()]
        self.last = [figure.item() for figure in figures]

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the weighted terms and the logits [B, C]: cross-entropy alone."""
        logits = self.student(x).logits
        return [F.cross_entropy(logits, y)], logits


class ConventionalKD(Conventional):
    """Cross-entropy and the teacher's softened predictions."""

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return both terms and the logits [B, C]."""
        with torch.no_grad():
            target = self.teacher(x).logits
        logits = self.student(x).logits
        return [0.1 * F.cross_entropy(logits, y), 0.9 * soft(logits, target, 4.0)], logits


class ConventionalCRD(Conventional):
    """KD and CRD; the negatives' rows are gathered from the banks, [B, 1 + m, d]."""

    samples = ContrastSamples

    def prepare(self, images: Images) -> None:
        """Add two embeddings and two banks."""
        count = len(images.train)
        both = (self.student, self.teacher)
        widths = [probe_features(each, images).pooled.shape[1] for each in both]
        self.embeddings = [nn.Linear(width, DIMENSION).to(self.device) for width in widths]
        bound = (DIMENSION / 3) ** -0.5
        shape = count, DIMENSION
        self.banks = [torch.empty(shape, device=self.device).uniform_(-bound, bound) for _ in "12"]
        self.normalisers = [0.0, 0.0]
        self.modules += self.embeddings

    def loss(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return three terms and the logits [B, C]."""
        with torch.no_grad():
            teacher = self.teacher(x)
        student = self.student(x)
        pooled = (student.pooled, teacher.pooled)
        ours, theirs = (
            F.normalize(embedding(feature), dim=1)
            for embedding, feature in zip(self.embeddings, pooled, strict=True)
        )
        contrast = self.contrast(ours, 1, index) + self.contrast(theirs, 0, index)
        self.renew(0, ours, index[:, 0])
        self.renew(1, theirs, index[:, 0])
        kd = soft(student.logits, teacher.logits, 4.0)
        terms = [F.cross_entropy(student.logits, y), kd, 0.8 * contrast]
        return terms, student.logits

    def contrast(self, embedding: Tensor, bank: int, index: Tensor) -> Tensor:
        """Return the loss of ``embedding`` [B, d] against rows [B, 1 + m] of a bank."""
        rows = self.banks[bank].index_select(0, index.flatten()).view(*index.shape, DIMENSION)
        scores = torch.bmm(rows, embedding[:, :, None])[:, :, 0].div(CONTRAST_TEMPERATURE).exp()
        count = len(self.banks[bank])
        if self.normalisers[bank] == 0:
            self.normalisers[bank] = scores.mean().item() * count
        scores = scores / self.normalisers[bank]
        noise = (index.shape[1] - 1) / count
        told = (scores[:, 0] / (scores[:, 0] + noise + SMALLEST)).log()
        rejected = (noise / (scores[:, 1:] + noise + SMALLEST)).log().sum(1)
        return -(told + rejected).mean()

    @torch.no_grad()
    def renew(self, bank: int, embedding: Tensor, rows: Tensor) -> None:
        """Move the batch's rows [B] of a bank towards ``embedding`` [B, d]."""
        moved = MOMENTUM * self.banks[bank][rows] + (1 - MOMENTUM) * embedding
        self.banks[bank].index_copy_(0, rows, F.normalize(moved, dim=1))


class ConventionalSSKD(Conventional):
    """SSKD; the similarities by an expansion to [3B, d, B], the kept rows by their numbers."""

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
        own = torch.arange(size, device=self.device).repeat_interleave(views - 1)
        truth = y.repeat_interleave(views - 1)
        rotated, teacher_rotated = student.logits[~normal], teacher.logits[~normal]
        keep_tf = kept(teacher_rotated, truth, 1.0)
        keep_ss = kept(teacher_scores, own, 0.75)
        terms = [
            0.1 * F.cross_entropy(student.logits[normal], y),
            0.9 * soft(student.logits[normal], teacher.logits[normal], 4.0),
            2.7 * soft(rotated[keep_tf], teacher_rotated[keep_tf], 4.0),
            10.0 * soft(scores[keep_ss], teacher_scores[keep_ss], 0.5),
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


def opponents_device(name: str) -> torch.device:
    """Return the device called ``name``, with what such code sets: cuDNN's benchmark."""
    torch.backends.cudnn.benchmark = True
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def soft(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KD's divergence of logits [N, C], times the squared temperature."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.softmax(target / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2


def kept(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Return the numbers of the rows that selective transfer keeps: as many as there are."""
    order = scores.sort(dim=1, descending=True).indices
    rank = (order == target[:, None]).nonzero()[:, 1]
    right = int((rank == 0).sum().item())
    return rank.argsort()[: right + int((len(rank) - right) * ratio)]


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
    """Return the top-1 accuracy in percent, batch by batch."""
    network.eval()
    right = 0.0
    for x, y, _ in loader:
        logits = network(x.to(device, non_blocking=True)).logits
        right += (logits.argmax(1) == y.to(device, non_blocking=True)).sum().item()
    return 100 * right / len(loader.dataset)  # type: ignore[arg-type]
