"""Sparse models: features that read some streams and write others.

One form covers all. Each source has its own features. They write one target in an autoencoder, a pair and per-layer
transcoders, and the targets of all later layers too in a cross-layer transcoder (Ameisen et al. 2025, "Circuit
Tracing"). Streams come and go in the units of the store. The maps to the model's units, where each channel has a mean
square of 1, are part of the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import SparseModelSpec
from services.clt.sparse import code as codes
from services.clt.sparse.code import SPARSE_BELOW, Code
from services.runtime.parallel import ALONE, World
from services.runtime.reading import reading
from services.runtime.tensors import write_tensors

FORMAT = 2
CONFIG, WEIGHTS = "model.json", "model.safetensors"
JUMP_WIDTH = 0.05
"""Width of the kernel of the straight-through estimate of a jump, for pre-activations of standard deviation 1."""
FIRST_THRESHOLD = 0.03
DEFAULT_K_RATIO = 0.05
_SCALE = ("mean", "factor", "back")


class Streams(NamedTuple):
    """The streams that a model reads and writes."""

    kind: Literal["sae", "pair", "per_layer", "cross_layer"]
    sources: list[str]
    """Hook points, in the order of the model."""
    targets: list[str]
    """As many hook points as sources; in an autoencoder the source itself."""
    source_widths: list[int]
    target_widths: list[int]

    def written(self, source: int) -> range:
        """Indices of the targets that a source's features write."""
        return range(source, len(self.targets) if self.kind == "cross_layer" else source + 1)


class Scale(nn.Module):
    """Maps a stream to the model's units: (x - ``mean``) times ``factor``, a scalar, one per channel, or a matrix."""

    mean: Tensor
    factor: Tensor
    back: Tensor

    def __init__(self, mean: Tensor, factor: Tensor, back: Tensor | None = None) -> None:
        super().__init__()
        if back is None:
            back = torch.linalg.pinv(factor) if factor.ndim == 2 else 1 / factor
        for name, tensor in zip(_SCALE, (mean, factor, back), strict=True):
            self.register_buffer(name, tensor.float().contiguous())

    def copied(self) -> Scale:
        """A copy on the CPU."""
        return Scale(self.mean.cpu().clone(), self.factor.cpu().clone(), self.back.cpu().clone())

    def forward(self, stream: Tensor) -> Tensor:
        """``stream`` ``[rows, width]`` in the model's units."""
        centred = stream - self.mean
        return centred @ self.factor if self.factor.ndim == 2 else centred * self.factor

    def undo(self, stream: Tensor) -> Tensor:
        """The inverse: from the model's units to the store's."""
        return (stream @ self.back if self.back.ndim == 2 else stream * self.back) + self.mean


class SparseModel(nn.Module):
    """An autoencoder or transcoder of ``streams``.

    ``encoders[s]`` ``[features, width]``; ``decoders[s]`` ``[features, sum of the widths of the targets that s
    writes]``, those targets side by side; ``skips[s]`` ``[target width, source width]``.
    """

    threshold: Tensor
    batches: Tensor

    def __init__(
        self,
        spec: SparseModelSpec,
        streams: Streams,
        scales: tuple[Sequence[Scale], Sequence[Scale]],
        generator: torch.Generator,
        dictionary: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.streams = spec, streams
        self.about: dict[str, object] = {}
        """The file's record of the model's training; empty unless it was loaded."""
        self.read, self.write = nn.ModuleList(scales[0]), nn.ModuleList(scales[1])
        self.features = [max(1, round(spec.expansion * width)) for width in streams.source_widths]
        if dictionary is not None:
            if dictionary.shape[1] != streams.target_widths[0]:
                text = f"writes {dictionary.shape[1]} channels, and {streams.targets[0]} has {streams.target_widths[0]}"
                raise InvalidInput.field("spec.model.dictionary", text)
            self.features = [len(dictionary)]
        share = spec.k_ratio or DEFAULT_K_RATIO
        self.k = [spec.k or max(1, round(share * count)) for count in self.features]
        for source, k, count in zip(streams.sources, self.k, self.features, strict=True):
            if k > count and spec.activation in ("topk", "batchtopk"):
                text = f"{k} is more than the {count} features of {source}; take fewer, or a larger expansion"
                raise InvalidInput.field("spec.model.k", text)
        encoders = [
            nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
            for count, width in zip(self.features, streams.source_widths, strict=True)
        ]
        self.encoders = nn.ParameterList(encoders)
        self.encoder_biases = nn.ParameterList(torch.zeros(count) for count in self.features)
        if streams.kind == "sae":
            # Tied at the start, so that a feature writes the direction that it reads.
            decoders = [encoder.clone() for encoder in encoders]
        elif dictionary is not None:
            decoders = [dictionary.clone()]
        else:
            widths = [sum(streams.target_widths[t] for t in streams.written(s)) for s in range(len(encoders))]
            decoders = [torch.zeros(count, width) for count, width in zip(self.features, widths, strict=True)]
        self.decoders = nn.ParameterList(decoders)
        self.decoders.requires_grad_(dictionary is None)
        self.decoder_biases = nn.ParameterList(torch.zeros(width) for width in streams.target_widths)
        self.skips = nn.ParameterList(
            torch.zeros(target, source)
            for source, target in zip(streams.source_widths, streams.target_widths, strict=True)
            if spec.skip
        )
        self.log_thresholds = nn.ParameterList(
            torch.full((count,), FIRST_THRESHOLD).log() for count in self.features if spec.activation == "jumprelu"
        )
        # A batchtopk's running mean of the smallest active value, for evaluation, and the batches that it is of.
        self.register_buffer("threshold", torch.zeros(len(encoders)))
        self.register_buffer("batches", torch.zeros(len(encoders)))

    def sparse(self, source: int) -> bool:
        """Whether a source's codes are sparse."""
        few = self.k[source] <= SPARSE_BELOW * self.features[source]
        on_cpu = self.encoders[0].device.type == "cpu"
        return on_cpu and few and self.spec.activation in ("topk", "batchtopk")

    def scales(self, side: Literal["read", "write"]) -> list[Scale]:
        """The maps of the sources, or of the targets, to the model's units."""
        modules = self.read if side == "read" else self.write
        return [module for module in modules if isinstance(module, Scale)]

    def scaled(self, streams: Sequence[Tensor], side: Literal["read", "write"]) -> list[Tensor]:
        """Sources or targets in the model's units."""
        return [scale(stream) for scale, stream in zip(self.scales(side), streams, strict=True)]

    def encode(self, inputs: Sequence[Tensor], *, bfloat16: bool = False, world: World = ALONE) -> list[Code]:
        """The codes of sources in the model's units, ``[rows, width]`` each. ``world``: the processes among which the
        rows of a batch are divided in training."""
        return [self._encode(s, stream, bfloat16, world) for s, stream in enumerate(inputs)]

    def _encode(self, s: int, stream: Tensor, bfloat16: bool, world: World) -> Code:
        weight, bias, k, kind = self.encoders[s], self.encoder_biases[s], self.k[s], self.spec.activation
        if self.sparse(s):
            if kind == "topk":
                return codes.top(stream, weight, bias, k, bfloat16=bfloat16)
            if not self.training:
                return codes.above(stream, weight, bias, float(self.threshold[s]), bfloat16=bfloat16)
            guess = 0.8 * float(self.threshold[s])
            code, least = codes.batch_top(stream, weight, bias, k, guess=guess, bfloat16=bfloat16, world=world)
            self._remember(s, least)
            return code
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=bfloat16):
            pre = (stream @ weight.T).float() + bias
        if kind == "jumprelu":
            value: Tensor = _Jump.apply(pre, self.log_thresholds[s].exp())  # type: ignore[no-untyped-call]
            return Code(value, pre=pre)
        positive = pre.relu()
        if kind == "topk":
            largest = positive.topk(k, dim=1, sorted=False)
            return Code(torch.zeros_like(pre).scatter(1, largest.indices, largest.values))
        if kind == "batchtopk":
            least = float(self.threshold[s])
            if self.training:
                count, numbers = codes.totals(k * len(stream), positive.numel(), device=stream.device, world=world)
                least = codes.kth_largest(positive.detach().flatten(), min(count, numbers), world)
                self._remember(s, least)
            return Code(positive * (positive.detach() >= least))
        return Code(positive)

    def least_active(self, s: int, stream: Tensor) -> Tensor:
        """The pre-activation from which a feature is active in each row of a source, ``[rows]``; that of the start of
        training in a jumprelu, whose features have their own thresholds."""
        kind = self.spec.activation
        if kind == "topk":
            pre = stream @ self.encoders[s].T + self.encoder_biases[s]
            least: Tensor = pre.topk(self.k[s], dim=1).values[:, -1].relu()
            return least
        threshold = {"batchtopk": float(self.threshold[s]), "jumprelu": FIRST_THRESHOLD}.get(kind, 0.0)
        return stream.new_full((len(stream),), threshold)

    @torch.no_grad()
    def _remember(self, s: int, least: float) -> None:
        # A short memory at first: the first batches are not typical.
        self.batches[s] += 1
        self.threshold[s] += max(0.01, 1 / float(self.batches[s])) * (least - float(self.threshold[s]))

    def decode(self, code: Sequence[Code], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Targets in the model's units, ``[rows, width]`` each, from codes and, with a skip, from the sources."""
        rows = len(inputs[0])
        targets = [bias.expand(rows, -1) for bias in self.decoder_biases]
        for s, (features, decoder) in enumerate(zip(code, self.decoders, strict=True)):
            written = self.streams.written(s)
            widths = [self.streams.target_widths[t] for t in written]
            for t, part in zip(written, torch.split(features.decode(decoder), widths, 1), strict=True):
                targets[t] = targets[t] + part
        for t, (skip, stream) in enumerate(zip(self.skips, inputs, strict=False)):
            targets[t] = targets[t] + stream @ skip.T
        return targets

    @torch.no_grad()
    def forward(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Reconstruct the targets from the sources, both in the units of the store, ``[rows, width]`` each."""
        inputs = self.scaled(sources, "read")
        targets = self.decode(self.encode(inputs), inputs)
        return [scale.undo(target) for scale, target in zip(self.scales("write"), targets, strict=True)]

    def decoder_directions(self, source: int, target: int) -> Tensor:
        """Directions in which a source's features write to a target, ``[features, target width]``."""
        written = self.streams.written(source)
        begin = sum(self.streams.target_widths[t] for t in written if t < target)
        directions: Tensor = self.decoders[source].narrow(1, begin, self.streams.target_widths[target])
        return directions

    def words(self, source: int, target: int) -> Tensor:
        """The old name of :meth:`decoder_directions`."""
        warnings.warn("SparseModel.words was renamed decoder_directions", DeprecationWarning, stacklevel=2)
        return self.decoder_directions(source, target)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make an autoencoder's decoder directions unit vectors: long ones would evade penalties of the code."""
        if self.streams.kind == "sae":
            for decoder in self.decoders:
                decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))

    def save(self, folder: Path, about: Mapping[str, object] | None = None) -> None:
        """Write ``model.json``, which holds ``about`` too, and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict())
        config = {
            "format": FORMAT,
            "model": self.spec.model_dump(mode="json"),
            "streams": self.streams._asdict(),
            "features": self.features,
            "tied": self.spec.dictionary is not None,
            "about": dict(about or {}),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> SparseModel:
        """Load a saved model for evaluation. Raises :class:`InvalidInput` for a missing or broken file."""
        folder = Path(folder)
        with reading(folder, CONFIG, "sparse model", "model") as path:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise InvalidInput.field(
                    "model", f"{path} has format {config['format']!r}; this version reads {FORMAT}"
                )
            state = load_file(folder / WEIGHTS)
            streams = Streams(**config["streams"])
            scales = [
                [Scale(*(state[f"{side}.{i}.{name}"] for name in _SCALE)) for i in range(len(streams.sources))]
                for side in ("read", "write")
            ]
            decoder = torch.zeros(config["features"][0], streams.target_widths[0]) if config["tied"] else None
            spec = SparseModelSpec.model_validate(config["model"])
            model = cls(spec, streams, (scales[0], scales[1]), torch.Generator(), decoder)
            model.load_state_dict(state)
            model.about = dict(config["about"])
        return model.to(device).eval().requires_grad_(False)


class _Jump(torch.autograd.Function):
    """JumpReLU: pre where it is above the threshold, else 0. The threshold's gradient is a straight-through estimate
    with a rectangular kernel (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * (pre > threshold), -(gradients[0] * threshold * _near(pre, threshold)).sum(0)


class Step(torch.autograd.Function):
    """1 where pre is above the threshold, else 0, for the penalty of active features of a JumpReLU; gradient for the
    threshold alone, by the same kernel."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, -(gradients[0] * _near(pre, threshold)).sum(0)


def _near(pre: Tensor, threshold: Tensor) -> Tensor:
    return ((pre - threshold).abs() < JUMP_WIDTH / 2).to(pre.dtype) / JUMP_WIDTH
