"""The one training loop: all members of a bank at once, each on its own rows, best weights kept per member."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from anomaly_cvae import checkpoints
from anomaly_cvae.divergence import Losses, LossesOnDevice, NotFinite
from anomaly_cvae.errors import BundleError, TrainingDivergedError
from anomaly_cvae.graphs import Captured, recorder_of
from anomaly_cvae.masks import MaskShapes, hidden_cells
from anomaly_cvae.model import CVAE
from anomaly_cvae.networks import full_float32, has_bfloat16
from anomaly_cvae.objectives import BoundObjective, Draws, Objective, Weight
from anomaly_cvae.optimizers import AdamW
from anomaly_cvae.rows import Batch, DeviceRows

LEARNING_RATE_WARMUP = 0.05
KL_WARMUP = 0.2
MAX_EPOCHS = 40
MAX_VALIDATION_ROWS = 2_000
VALIDATION_SHARE = 0.9
VALIDATION_SAMPLES = 1
"""Samples of z per held-out row of images: decoding them is what a look costs."""
CHECKPOINT_SECONDS = 60.0
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
NOT_COMPARED = ("objective", "checkpoint", "capture")
"""Settings that a continued training may have otherwise, or that are compared by their kind."""
LOOK_EVERY = 50
"""Steps of a device that the host runs ahead of, after which it looks whether a loss was not finite."""
BLIND_SHARE = 0.1
"""Rows that are shown nothing of themselves where an observed part is the condition."""

PerMember = float | tuple[float, ...]
"""One number for all members, or several that are dealt to them in turn."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a bank is trained.

    ``patience`` counts epochs without a better held-out negative ELBO, at the ``kl_weight`` that training ends
    with; ``clip_norm`` bounds each member's gradient; ``mask_rate`` is the share of rows that have a random part
    of their cells hidden, of images in ``mask_shapes``; ``mixed_precision`` takes products and convolutions in
    bfloat16. ``checkpoint`` is a file to continue from, and to note progress in.
    ``capture`` makes a step one CUDA graph, on CUDA and where the objective's steps are all alike.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    objective: Objective = field(default_factory=BoundObjective)
    kl_weight: PerMember = 1.0
    input_noise: PerMember = 0.0
    mask_rate: float = 0.0
    mask_shapes: MaskShapes = "mixed"
    patience: int = 10
    weight_decay: float = 1e-4
    clip_norm: float = 5.0
    mixed_precision: bool = False
    checkpoint: Path | None = None
    capture: bool = True


@dataclass(frozen=True)
class Epoch:
    """One round of training steps and the held-out negative ELBO (nats per row) after it; the largest KL weight."""

    epoch: int
    step: int
    train_negative_elbo: float
    validation_negative_elbo: float
    learning_rate: float
    kl_weight: float
    improved_members: int
    seconds: float
    validation_per_member: tuple[float, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Training:
    """What the loop returns: its epochs and why it ended."""

    epochs: list[Epoch]
    stopped_by: str


def train(
    model: CVAE,
    rows: DeviceRows,
    training_rows: Sequence[Tensor],
    validation_rows: Sequence[Tensor],
    settings: TrainingSettings,
    *,
    generator: torch.Generator,
    validation_noise: Tensor,
    on_epoch: Callable[[Epoch], bool] | None = None,
    describe: Callable[[int, int], str] = lambda member, column: f"column {column}, member {member}",
    refresh: Callable[[int], None] | None = None,
) -> Training:
    """Train ``model`` in place and leave every member with its own best weights.

    Parameters
    ----------
    training_rows, validation_rows : one tensor of row numbers per member
    generator : the only source of randomness, on the device of ``rows``
    validation_noise : (S, Z) fixed points, so that two epochs are comparable
    on_epoch : called after each epoch; returning True ends the training
    describe : names a member and a column for the message when a value is not finite
    refresh : called before each step with its number, to bring other training rows into ``rows``

    Raises
    ------
    TrainingDivergedError
        When a loss is not finite; names the column and the step. The model has its best weights.
    """
    loop = _Loop(model, rows, training_rows, validation_rows, settings, generator, validation_noise, describe)
    loop.refresh = refresh
    try:
        with full_float32(rows.values.device):
            stopped_by = loop.run(on_epoch)
    except KeyboardInterrupt:
        if not loop.epochs:
            raise  # before the first look at held-out rows there are no best weights to keep
        stopped_by = "interrupt"
    except NotFinite as found:
        raise loop.diverged(found) from None
    finally:
        loop.take_step.release()
        loop.restore_best()
    return Training(loop.epochs, stopped_by)


class _Loop:
    def __init__(
        self,
        model: CVAE,
        rows: DeviceRows,
        training_rows: Sequence[Tensor],
        validation_rows: Sequence[Tensor],
        settings: TrainingSettings,
        generator: torch.Generator,
        validation_noise: Tensor,
        describe: Callable[[int, int], str],
    ) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.generator, self.noise, self.describe = generator, validation_noise, describe
        device = rows.values.device
        self.draws = Draws(generator, device, rows.values.dtype)
        self.table, self.counts = _pad(training_rows, device)
        held_out = [chosen[:MAX_VALIDATION_ROWS] for chosen in validation_rows]
        self.validation_table, self.validation_counts = _pad(held_out, device)
        # At least two batches a pass: a batch of all rows costs twice as much and learns no better.
        self.longest = max(map(len, training_rows))
        self.batch_size = min(settings.batch_size, math.ceil(self.longest / 2))
        self.parameters = list(model.parameters())
        recorder = recorder_of(device)
        self.runs_ahead = recorder is not None
        steps_are_alike = self.runs_ahead and settings.objective.capturable
        members = len(training_rows)
        kl_weights = dealt(settings.kl_weight, members)
        self.largest_kl_weight = max(kl_weights)
        # Of the largest weight, what each member has, (M, 1); None where they are alike.
        self.kl_shares: Tensor | None = None
        if len(set(kl_weights)) > 1:
            shares = [weight / self.largest_kl_weight for weight in kl_weights]
            self.kl_shares = torch.tensor(shares, dtype=rows.values.dtype, device=device).reshape(-1, 1)
        self.rate: Weight = settings.learning_rate
        self.kl: Weight = self.largest_kl_weight
        if steps_are_alike:
            self.rate, self.kl = _dials(device)
        # The fused step exists for CPU and CUDA; one kernel for all parameters.
        self.optimizer = AdamW(
            self.parameters,
            lr=self.rate,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
            capturable=steps_are_alike,
        )
        self.losses = self.losses_from(0)
        self.take_step = Captured(
            self.step, recorder if settings.capture and steps_are_alike else None, name="training",
            generators=[generator],
        )  # fmt: skip
        self.precision = torch.autocast(device.type, torch.bfloat16, settings.mixed_precision and has_bfloat16(device))
        noises = dealt(settings.input_noise, members)
        self.input_noise = torch.tensor(noises, dtype=rows.values.dtype, device=device).reshape(-1, 1, 1)
        self.has_noise = bool(self.input_noise.any())
        self.best_loss = torch.full((members,), torch.inf, dtype=torch.float64, device=device)
        self.best = [p.detach().clone() for p in self.parameters]
        self.stale = torch.zeros(members, dtype=torch.long, device=device)
        self.epochs: list[Epoch] = []
        self.refresh: Callable[[int], None] | None = None
        # Of the rows as they are at first: later ones may have come into their places.
        self.identity = "" if settings.checkpoint is None else self.fingerprint()
        self.started = self.noted = time.perf_counter()
        settings.objective.start(model, self.draws, settings.learning_rate)

    def run(self, on_epoch: Callable[[Epoch], bool] | None) -> str:
        interval = epoch_length(self.longest, self.batch_size, self.settings.max_steps)
        first = self.resume()
        self.losses = self.losses_from(first)
        if first == 0:
            self.evaluate(0, math.nan)
        if self.is_stale():
            return "early stopping"
        for step in range(first, self.settings.max_steps):
            self.advance(step)
            if (step + 1) % interval and step + 1 < self.settings.max_steps:
                continue
            self.losses.look()
            self.epochs.append(self.evaluate(step + 1, self.losses.take_mean()))
            self.note(step + 1)
            if on_epoch is not None and on_epoch(self.epochs[-1]):
                return "callback"
            if self.is_stale():
                return "early stopping"
        return "max_steps"

    def losses_from(self, first: int) -> Losses:
        """What sums the losses of the steps from ``first`` on."""
        if not self.runs_ahead:
            return Losses(first)
        return LossesOnDevice(first, len(self.counts), self.rows.values.shape[1], self.rows.values.device)

    def is_stale(self) -> bool:
        """Whether no member has improved for as long as patience lasts."""
        return self.settings.objective.keeps_best and int(self.stale.min()) >= self.settings.patience

    def advance(self, step: int) -> None:
        """Everything that belongs to one step; the host does not wait for a device that it runs ahead of."""
        if self.refresh is not None:
            self.refresh(step)
        self.rate, self.kl = _turn(self.rate, self.learning_rate(step)), _turn(self.kl, self.kl_weight(step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.take_step()
        self.losses.count()
        self.settings.objective.after(self.learning_rate(step))
        if self.runs_ahead and (step + 1) % LOOK_EVERY == 0:
            self.losses.look()

    def step(self) -> None:
        """One optimiser step of every member, at the rate and with the KL weight that are set."""
        batch = self.augment(self.rows.batch(self.draw()))
        with self.precision:
            found = self.settings.objective.loss(self.model, batch, self.draws, self.of_members(self.kl))
        loss = found.rows.mean(-1)
        self.losses.add(loss.detach(), batch, found)
        self.optimizer.zero_grad(set_to_none=True)
        # Members share no parameter, so the gradient of the sum is each member's own gradient.
        (loss.sum() / batch.values.shape[-1]).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        self.clip_gradients()
        self.optimizer.step()

    def draw(self) -> Tensor:
        """Row numbers (M, B), drawn with replacement from each member's own rows."""
        shape = (len(self.counts), self.batch_size)
        uniform = torch.rand(shape, generator=self.generator, device=self.table.device, dtype=torch.float64)
        return self.table.gather(1, (uniform * self.counts.unsqueeze(1)).long())

    def augment(self, batch: Batch) -> Batch:
        """Add training noise, and hide a random part of some rows."""
        if self.has_noise and self.settings.objective.takes_noise:
            batch = self.model.jitter(batch, self.input_noise, self.generator)
        members, n_rows, n_cells = batch.values.shape
        lead, shapes, form = (members, n_rows), self.model.shapes, self.settings.mask_shapes
        if self.settings.mask_rate > 0.0:
            hidden = hidden_cells(self.draws, lead, n_cells, shapes, form)
            hidden = hidden * (self.draws.uniform(*lead, 1) < self.settings.mask_rate)
            kept = 1.0 - hidden
            batch = replace(batch, observed=kept if batch.observed is None else batch.observed * kept)
        return self.with_given(batch, self.draws)

    def with_given(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with a random part of its cells as condition, where the model takes one."""
        if not self.model.architecture.observed_condition:
            return batch
        members, n_rows, n_cells = batch.values.shape
        hidden = hidden_cells(draws, (members, n_rows), n_cells, self.model.shapes, self.settings.mask_shapes)
        # Some rows see nothing: the model of them is p(x | c), which samples and whole rows are judged by.
        blind = draws.uniform(members, n_rows, 1) < BLIND_SHARE
        return replace(batch, given=torch.where(blind, 0.0, 1.0 - hidden))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to zero."""
        warmup = max(1, round(LEARNING_RATE_WARMUP * self.settings.max_steps))
        progress = (step - warmup) / max(1, self.settings.max_steps - warmup)
        decay = 0.5 * (1.0 + math.cos(math.pi * max(0.0, progress)))
        return self.settings.learning_rate * min(1.0, (step + 1) / warmup) * decay

    def kl_weight(self, step: int) -> float:
        """Linear warm-up from 0: latent units are not switched off before the decoder can use them."""
        warmup = max(1, round(KL_WARMUP * self.settings.max_steps))
        return self.largest_kl_weight * min(1.0, step / warmup)

    def of_members(self, kl_weight: Weight) -> Weight:
        """Of a member with the largest weight, as that of each: (M, 1) where they differ."""
        return kl_weight if self.kl_shares is None else kl_weight * self.kl_shares

    def clip_gradients(self) -> None:
        """Bound each member's gradient norm on its own: one bad member must not slow the others."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        factor = (self.settings.clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-12)).clamp(max=1.0)
        if not self.runs_ahead and bool((factor == 1.0).all()):
            return
        for gradient in gradients:
            gradient.mul_(factor.reshape(-1, *[1] * (gradient.dim() - 1)))

    @torch.no_grad()
    def evaluate(self, step: int, train_loss: float) -> Epoch:
        """Held-out negative ELBO of every member; remember the weights of those that improved."""
        loss = self.validation_loss()
        improved = loss < self.best_loss
        self.best_loss = torch.where(improved, loss, self.best_loss)
        self.stale = torch.where(improved, 0, self.stale + 1)
        kept = improved if self.settings.objective.keeps_best else torch.ones_like(improved)
        for best, parameter in zip(self.best, self.parameters, strict=True):
            best[kept] = parameter.detach()[kept]
        return Epoch(
            epoch=len(self.epochs) + 1,
            step=step,
            train_negative_elbo=train_loss,
            validation_negative_elbo=float(loss.mean()),
            learning_rate=self.learning_rate(max(step - 1, 0)),
            kl_weight=self.kl_weight(max(step - 1, 0)),
            improved_members=int(improved.sum()),
            seconds=time.perf_counter() - self.started,
            validation_per_member=tuple(loss.tolist()),
        )

    def validation_loss(self) -> Tensor:
        """Mean held-out loss of each member, (M,), float64: the negative ELBO or what the objective says instead.

        The worst tenth of the rows is left out: one spike in a nearly constant column costs thousands of
        nats, and would make the untrained network the best one.
        """
        weight = self.of_members(self.largest_kl_weight)
        losses, noise = [], self.noise[:VALIDATION_SAMPLES] if self.model.shapes else self.noise
        device = self.rows.values.device
        masks = Draws(torch.Generator(device).manual_seed(0), device, self.rows.values.dtype)
        for start in range(0, self.validation_table.shape[1], 500):
            chosen = self.validation_table[:, start : start + 500]
            batch = self.with_given(self.rows.batch(chosen), masks)
            losses.append(self.settings.objective.held_out(self.model, batch, noise, weight))
        ranked = torch.cat(losses, dim=1)
        place = torch.arange(ranked.shape[1], device=ranked.device)
        ranked = torch.where(place < self.validation_counts.unsqueeze(1), ranked, torch.inf).sort(dim=1).values
        kept = torch.floor(VALIDATION_SHARE * self.validation_counts).clamp(min=1)
        total: Tensor = torch.where(place < kept.unsqueeze(1), ranked, 0.0).sum(1) / kept
        return total.double()

    @torch.no_grad()
    def restore_best(self) -> None:
        for best, parameter in zip(self.best, self.parameters, strict=True):
            parameter.copy_(best)

    def resume(self) -> int:
        """Continue from the checkpoint, if there is one; returns the first step to take.

        Raises
        ------
        BundleError
            If the checkpoint is of another model, of other settings, or damaged.
        """
        path = self.settings.checkpoint
        if path is None or not path.is_file():
            return 0
        tensors, notes = checkpoints.read(path, self.rows.values.device)
        if notes["settings"] != self.identity:
            raise BundleError(
                f"{path} is the checkpoint of another training (model, rows or settings differ); delete it to start "
                "again, or give another file"
            )
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
                self.best[i].copy_(tensors[f"best.{i}"])
        own = {name.removeprefix("objective."): t for name, t in tensors.items() if name.startswith("objective.")}
        self.settings.objective.restore(own)
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {key: tensors[f"optimizer.{i}.{key}"].cpu() if key == "step" else tensors[f"optimizer.{i}.{key}"]
                for key in OPTIMIZER_STATE}
            for i in range(len(self.parameters))
            if f"optimizer.{i}.step" in tensors  # a parameter that nothing depends on has no state
        }  # fmt: skip
        self.optimizer.load_state_dict(state)
        self.best_loss, self.stale = tensors["best_loss"], tensors["stale"]
        self.generator.set_state(tensors["generator"].cpu())
        self.epochs = [Epoch(**e) for e in notes["epochs"]]
        self.started -= self.epochs[-1].seconds if self.epochs else 0.0
        return int(notes["step"])

    def note(self, step: int) -> None:
        """Write down where training stands after ``step`` steps, a minute or more after the last time."""
        path, now = self.settings.checkpoint, time.perf_counter()
        if path is None or (now - self.noted < CHECKPOINT_SECONDS and step < self.settings.max_steps):
            return
        self.noted = now
        state = self.optimizer.state_dict()["state"]
        tensors = {
            **checkpoints.named("parameter", self.parameters),
            **checkpoints.named("best", self.best),
            **{f"objective.{name}": value for name, value in self.settings.objective.state().items()},
            **{f"optimizer.{i}.{key}": own[key] for i, own in state.items() for key in OPTIMIZER_STATE},
            "best_loss": self.best_loss,
            "stale": self.stale,
            "generator": self.generator.get_state(),
        }
        notes = {"step": step, "settings": self.identity, "epochs": [asdict(epoch) for epoch in self.epochs]}
        try:
            checkpoints.write(path, tensors, notes)
        except OSError as fault:
            warnings.warn(f"progress cannot be noted in {path} ({fault}); training goes on without", stacklevel=2)

    def fingerprint(self) -> str:
        """What has to agree for a checkpoint to be of this training."""
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in NOT_COMPARED}
        digest = hashlib.sha256()
        rows, tables = self.rows, (self.table, self.counts, self.validation_table, self.validation_counts)
        for part in (rows.values, rows.observed, rows.condition, rows.class_index, *tables):
            if part is not None:
                digest.update(part.cpu().contiguous().numpy().tobytes())
        described = [self.model.describe(), settings, self.settings.objective.describe()]
        return json.dumps([*described, digest.hexdigest()])

    def diverged(self, found: NotFinite) -> TrainingDivergedError:
        """The error of a loss that is not finite, which names the column and the step."""
        where = self.describe(*found.blame.culprit())
        return TrainingDivergedError(
            f"training met a value that is not finite at step {found.step} in {where}; lower learning_rate "
            f"(now {self.settings.learning_rate:g}), or look at that column's scale and outliers"
        )


def dealt(numbers: PerMember, members: int) -> list[float]:
    """The number of each member: several are dealt in turn."""
    several = numbers if isinstance(numbers, tuple) else (numbers,)
    return list(islice(cycle(several), members))


def _dials(device: torch.device) -> tuple[Tensor, Tensor]:
    """Learning rate and KL weight as tensors () that steps read on the device."""
    # The fused step on CUDA takes its rate in float32 alone.
    single = device.type == "cuda"
    rate = torch.zeros((), dtype=torch.float32 if single else torch.float64, device=device)
    return rate, torch.zeros((), dtype=torch.float64, device=device)


def _turn(dial: Weight, value: float) -> Weight:
    """The dial with a new value: a tensor in place."""
    return dial.fill_(value) if isinstance(dial, Tensor) else value


def epoch_length(n_rows: int, batch_size: int, max_steps: int) -> int:
    """Steps between two looks at the held-out rows: one pass over the data, but at most 40 looks in all."""
    return min(max_steps, max(math.ceil(n_rows / batch_size), math.ceil(max_steps / MAX_EPOCHS)))


def _pad(chosen: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of unequal length as (M, longest) and their counts (M,)."""
    counts = torch.tensor([len(rows) for rows in chosen], device=device)
    table = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.long, device=device)
    for member, rows in enumerate(chosen):
        table[member, : len(rows)] = rows
    return table, counts
