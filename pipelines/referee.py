"""An independent judge of generated images: a plain convolutional classifier trained on real ones alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

BATCH = 128
LARGEST_SHIFT = 2


class Referee(nn.Module):
    """Convolutions and two dense layers; ``n_outputs`` classes, or so many yes-or-no attributes."""

    def __init__(self, shape: tuple[int, int, int], n_outputs: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for n in (32, 64, 128):
            layers += [nn.Conv2d(channels, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = n, height // 2, width // 2
        dense = [nn.Linear(channels * height * width, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, n_outputs)]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.4), *dense)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, n_outputs)."""
        logits: Tensor = self.network(images)
        return logits

    @torch.inference_mode()
    def logits(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Logits of images (N, H, W) or (N, H, W, 3) of bytes."""
        self.eval()
        parts = [self(to_tensor(images[i : i + 500])) for i in range(0, len(images), 500)]
        return torch.cat(parts).numpy()


def to_tensor(images: npt.NDArray[Any]) -> Tensor:
    """Bytes as numbers around 0, channels first."""
    values = torch.as_tensor(np.asarray(images, dtype=np.float32)) / 127.5 - 1.0
    return values.unsqueeze(1) if values.dim() == 3 else values.permute(0, 3, 1, 2).contiguous()


def referee(
    file: Path, images: npt.NDArray[Any], targets: npt.NDArray[Any], *, epochs: int, flip: bool = False, seed: int = 0
) -> Referee:
    """The referee saved in ``file``, or a new one: ``targets`` are classes (N,) or attributes (N, A) in 0 and 1."""
    attributes = targets.ndim == 2
    torch.manual_seed(seed)
    judge = Referee(tuple(to_tensor(images[:1]).shape[1:]), targets.shape[1] if attributes else int(targets.max()) + 1)
    if file.is_file():
        judge.load_state_dict(load_file(file))
        return judge
    goal = torch.as_tensor(targets, dtype=torch.float32 if attributes else torch.long)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    judge.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            logits = judge(_varied(to_tensor(images[rows.numpy()]), flip))
            compared = binary_cross_entropy_with_logits if attributes else cross_entropy
            loss = compared(logits, goal[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file)
    return judge


def _varied(images: Tensor, flip: bool) -> Tensor:
    """The batch shifted by up to two pixels, and perhaps mirrored."""
    down, right = (int(n) for n in torch.randint(0, 2 * LARGEST_SHIFT + 1, (2,)))
    height, width = images.shape[-2:]
    padded = pad(images, [LARGEST_SHIFT] * 4, value=-1.0 if not flip else 0.0)
    shifted = padded[..., down : down + height, right : right + width]
    return shifted.flip(-1) if flip and torch.rand(()) < 0.5 else shifted
