"""The negative ELBO as ONNX graphs: ONNX Runtime calls one operator after the other with less overhead than Python."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_cvae.encoding import LARGEST_VALUE
from anomaly_cvae.errors import ParameterError
from anomaly_cvae.frames import FloatArray
from anomaly_cvae.model import CVAE
from anomaly_cvae.networks import Condition
from anomaly_cvae.objectives import elbo
from anomaly_cvae.priors import Mixture
from anomaly_cvae.rows import Batch

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
GRAPH_NUMBERS = 1 << 17
"""Activations of one layer, in numbers, at a time: there is no Python between the layers, so few pay."""
TRACED_ROWS = 8


@dataclass(frozen=True)
class ClassInputs:
    """What a graph is told of a class: location and scale (D,), condition (1, 1, C), and the mixture prior's parts."""

    center: FloatArray
    scale: FloatArray
    condition: Tensor | None
    prior: Mixture | None

    def tensors(self) -> dict[str, Tensor]:
        """By the graph's input names."""
        found = {"center": torch.from_numpy(self.center), "scale": torch.from_numpy(self.scale)}
        if self.condition is not None:
            found["condition"] = self.condition
        if self.prior is not None:
            prior = self.prior
            found |= {"log_weight": prior.log_weight, "mean": prior.mean, "log_variance": prior.log_variance}
        return found


class NegativeElbo(nn.Module):
    """Encoded complete rows (N, D) of one class to nats (N,): the mean over members, by the weights of their parts."""

    def __init__(self, model: CVAE, noise: Tensor, members: slice, weights: Tensor | None) -> None:
        super().__init__()
        n = members.stop - members.start
        parts = [[1.0 / n] * 2] * n if weights is None else weights[members].tolist()
        self.weights, self.kl_weights = [own for own, _ in parts], [kl / own for own, kl in parts]
        self.model, self.members = model, range(members.start, members.stop)
        self.register_buffer("noise", noise)

    def forward(
        self,
        values: Tensor,
        center: Tensor,
        scale: Tensor,
        condition: Tensor | None = None,
        log_weight: Tensor | None = None,
        mean: Tensor | None = None,
        log_variance: Tensor | None = None,
    ) -> Tensor:
        """As `ScoringEngine` does it, member by member: products of plain matrices are what runs fast."""
        noise = self.get_buffer("noise")
        own = ((values - center) / scale).clamp(-LARGEST_VALUE, LARGEST_VALUE).to(noise.dtype)
        told = None if condition is None else Condition(condition)
        batch = Batch(own.unsqueeze(0), None, told, torch.log(scale).to(noise.dtype).reshape(1, 1, -1))
        total = torch.zeros(1, dtype=torch.float64)
        for place, m in enumerate(self.members):
            one, prior = slice(place, place + 1), None
            if log_weight is not None and mean is not None and log_variance is not None:
                prior = Mixture(log_weight[one], mean[one], log_variance[one])
            terms = self.model.terms(batch, noise, members=slice(m, m + 1), prior=prior)
            total = total - self.weights[place] * elbo(terms, self.kl_weights[place])[0]
        return total


@dataclass
class OnnxBank:
    """Graphs of a bank, one for every group of members that scores rows together, made when first needed.

    Scores agree with those of torch as two scores of torch of one row do.
    """

    model: CVAE
    noise: Tensor
    weights: Tensor | None = None
    sessions: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: CVAE, noise: Tensor, weights: Tensor | None = None) -> OnnxBank:
        """Graphs of this model, whose members' parts count by ``weights`` (M, 2).

        Raises
        ------
        ParameterError
            If ONNX Runtime is not installed, or the model is none that it is used for.
        """
        absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if absent:
            raise ParameterError(
                f"backend='onnx' needs the package {absent[0]!r}, which is not installed: "
                "pip install 'anomaly_cvae[onnx]', or leave the choice to backend='auto'"
            )
        why_not = _unsuitable(model, noise)
        if why_not:
            raise ParameterError(f"backend='onnx' cannot be used: {why_not}; leave the choice to backend='auto'")
        return cls(model, noise, weights)

    @property
    def chunk_rows(self) -> int:
        """Rows at a time."""
        return max(32, GRAPH_NUMBERS // (len(self.noise) * self.model.widest))

    def scorer(self, members: slice, inputs: ClassInputs) -> Callable[[FloatArray], FloatArray]:
        """What turns encoded rows (N, D) of a class into nats (N,)."""
        session = self._session(members, inputs)
        fixed = {name: value.numpy() for name, value in inputs.tensors().items()}

        def score(values: FloatArray) -> FloatArray:
            nats: FloatArray = session.run(None, {"values": values, **fixed})[0]
            return nats

        return score

    def _session(self, members: slice, inputs: ClassInputs) -> Any:
        if members.start not in self.sessions:
            self.sessions[members.start] = _session(
                NegativeElbo(self.model, self.noise, members, self.weights), inputs.tensors(), self.model.n_cells
            )
        return self.sessions[members.start]


def _unsuitable(model: CVAE, noise: Tensor) -> str:
    """Why a model is scored by torch; empty if it need not be."""
    if noise.device.type != "cpu" or noise.dtype != torch.float32:
        return f"the model computes in {noise.dtype} on {noise.device.type}, not in float32 on a CPU"
    if model.shapes:
        return "columns of images are scored by torch"
    if model.architecture.observed_condition:
        return "a model that takes an observed part of the row as condition is scored by torch"
    return ""


def _session(module: NegativeElbo, fixed: dict[str, Tensor], n_cells: int) -> Any:
    """A session on the module's graph; one thread, as rows are shared out among threads.

    Raises
    ------
    ParameterError
        If a likelihood of the model has no counterpart among ONNX's operators, as those of counts.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(_exported(module, fixed, n_cells), options, providers=["CPUExecutionProvider"])


def _exported(module: NegativeElbo, fixed: dict[str, Tensor], n_cells: int) -> bytes:
    inputs = {"values": torch.zeros(TRACED_ROWS, n_cells, dtype=torch.float64), **fixed}
    shapes: dict[str, Any] = dict.fromkeys(inputs)
    shapes["values"] = {0: torch.export.Dim.DYNAMIC}
    for name, axis in (("log_weight", 1), ("mean", 1), ("log_variance", 1)):
        if name in inputs:
            shapes[name] = {axis: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), torch.enable_grad():  # without, the layers would be those of oneDNN, which ONNX does not know
            program = torch.onnx.export(
                module.eval(), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, input_names=list(inputs),
                verbose=False,
            )  # fmt: skip
    except Exception as error:  # its own kinds of error are many, and none of them is the user's mistake
        reason = str(error).strip().splitlines()[0][:200]
        raise ParameterError(f"backend='onnx' cannot be used: the model has no ONNX graph ({reason})") from error
    assert program is not None
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not there and on its own progress."""
    log, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
