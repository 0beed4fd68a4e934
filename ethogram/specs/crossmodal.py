"""Spec of a crossmodal job: train an encoder-decoder and its steering directions on a zoo, then evaluate them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from ethogram.specs.base import ArtifactRef, HubSpec, OptimizationSpec, Spec, TrainedSpec


class CodecSpec(Spec):
    """Architecture of the encoder and the decoder."""

    architecture: Literal["mlp", "transformer"] = "mlp"
    """``mlp``: fast; ``transformer``: self-attention over tokens; its decoder has cross-attention to the latent."""
    inputs: Literal["signature", "weights", "both"] = "signature"
    """What the encoder reads of a network."""
    latent_dim: int = Field(256, ge=1, le=65_536)
    """Length of a latent vector."""
    hidden_dim: int = Field(768, ge=1, le=65_536)
    """Width of the hidden layers and of their tokens."""
    depth: int = Field(2, ge=1, le=48)
    """Hidden layers of the encoder, and of the decoder."""
    heads: int = Field(8, ge=1, le=1024)
    """Attention heads of the ``transformer``; ``hidden_dim`` divides into them."""
    pooling: Literal["flatten", "mean", "max", "cls"] = "flatten"
    """How the encoder pools its tokens; ``cls``, of the ``transformer``, takes a special token."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Positional encoding of tokens; not used by an ``mlp`` with ``flatten``, which has no tokens."""
    granularity: Literal["neuron", "chunk"] = "neuron"
    """A token of weights holds those of one ``neuron``, or ``chunk`` consecutive weights, as in earlier work; not used
    by an ``mlp`` with ``flatten``."""
    chunk: int = Field(64, ge=1, le=65_536)
    """Weights per token of granularity ``chunk``."""
    signature_components: int = Field(768, ge=1, le=65_536)
    """Principal components of the standardised inputs of an ``mlp`` with ``flatten``; at most as many as there are
    training subjects."""
    canonicalize: bool | None = None
    """Whether hidden neurons are first matched to a reference network's, by their activations on the probes, and for
    relu scaled to incoming weights of norm 1; None: if the zoo's ``init`` is independent."""

    @model_validator(mode="after")
    def _fits(self) -> CodecSpec:
        if self.architecture == "transformer" and self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        if self.architecture == "mlp" and self.pooling == "cls":
            raise ValueError("pooling: cls needs architecture: transformer; an mlp has mean, max and flatten")
        return self

    def unused(self) -> Iterator[tuple[str, str]]:
        mlp = self.architecture == "mlp"
        if mlp:
            yield "heads", "an mlp has no attention"
        if self.flat:
            yield "positions", "an mlp that flattens has no tokens"
        else:
            yield "signature_components", "only an mlp that flattens takes principal components"
        if mlp and (self.flat or self.inputs == "signature"):
            yield "granularity", "no weights are tokens"
            yield "chunk", "no weights are tokens"
        elif self.granularity != "chunk":
            yield "chunk", "tokens are neurons"

    @property
    def flat(self) -> bool:
        """Whether the encoder reads one flat vector, not tokens."""
        return self.architecture == "mlp" and self.pooling == "flatten"


class LossSpec(Spec):
    """The objective: gamma x contrastive + (1 - gamma) x the weighted sum of the other terms. Weight 0 switches a term
    off."""

    gamma: float = Field(0.005, ge=0, le=1)
    """Share of the supervised contrastive loss over shared behaviours, at the first step."""
    gamma_end: float | None = Field(None, ge=0, le=1)
    """Share at the last step, linear in between; None: constant."""
    contrastive: Literal["graded", "plain"] = "graded"
    """``plain``: subjects that share any behaviour are positives; ``graded``: weighted by the overlap of behaviours."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the contrastive loss, at the first step."""
    temperature_end: float | None = Field(None, gt=0)
    """Temperature at the last step; None: constant."""
    projection: int | None = Field(None, ge=1, le=65_536)
    """Output width of a projection head between the latent and the contrastive loss; None: no head."""
    reconstruction: float = Field(0.05, ge=0)
    """Weight of the error of the decoded weights."""
    reconstruction_form: Literal["normalized", "mse", "mae", "cosine", "combined"] = "normalized"
    """``normalized``: squared error in which all layers count alike; ``mse``, ``mae`` and ``cosine``: of standardised
    weights; ``combined``: the sum of these three."""
    behavior: float = Field(1.0, ge=0)
    """Weight of the disagreement between decoded and source networks on fresh sequences."""
    steering: float = Field(3.0, ge=0)
    """Weight of the error of residual edits (source weights plus the change of decoded weights) against the requested
    behaviours."""
    direct: float = Field(0.75, ge=0)
    """Weight of the same error for direct edits (the decoded weights themselves)."""
    locality: float = Field(0.8, ge=0, le=1)
    """Share of the two steering terms that preserves the source's answers on sequences the edit does not concern."""
    mend: bool = True
    """Whether to correct the source's wrong answers on the sequences of ``locality``; else they are preserved."""
    variance: float = Field(0.0, ge=0)
    """Weight of the guard against collapse: mean shortfall of the latents' standard deviations from 1."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if not self.gamma and not self.gamma_end:
            for name in ("contrastive", "temperature", "temperature_end", "projection"):
                yield name, "gamma is 0"
        if self.contrastive_alone:
            for name in ("reconstruction", "behavior", "steering", "direct", "variance"):
                # 0 switches a term off, which is what happens to it.
                if getattr(self, name):
                    yield name, "gamma is 1, so that the contrastive loss is all"
        if not self.reconstruction or self.contrastive_alone:
            yield "reconstruction_form", "there is no reconstruction in the loss"
        if not (self.steering or self.direct) or self.contrastive_alone:
            for name in ("locality", "mend"):
                yield name, "there is neither steering nor direct in the loss"

    @property
    def contrastive_alone(self) -> bool:
        """Whether the other terms never count."""
        return self.gamma == 1 and self.gamma_end in (None, 1)

    @property
    def runs_networks(self) -> bool:
        """Whether it depends on what decoded networks answer."""
        return any((self.behavior, self.steering, self.direct)) and not self.contrastive_alone

    @model_validator(mode="after")
    def _something(self) -> LossSpec:
        others = (self.reconstruction, self.behavior, self.steering, self.direct, self.variance)
        if not any((self.gamma, *others)):
            raise ValueError("no term has a weight at the first step, so there is nothing to learn; give one a weight")
        return self


class CodecTrainingSpec(OptimizationSpec):
    """How the codec is trained: AdamW; gradients are clipped to norm 1."""

    batch_size: int = Field(256, ge=2, le=65_536, multiple_of=2)
    """Subjects per step, in pairs that share a behaviour."""
    accumulation: int = Field(1, ge=1, le=1024)
    """Parts of each batch that pass through the model one after the other; their gradients are added."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """Learning rate after the warm-up. ``cosine``: falls to a hundredth at the last step; ``plateau``: halves when the
    validation loss has not fallen for ``plateau_patience`` validations."""
    warm_up: int = Field(100, ge=0, le=10_000_000)
    """Steps over which the learning rate rises linearly from 0."""
    plateau_patience: int = Field(4, ge=1, le=10_000)
    """Validations without improvement before ``plateau`` halves the learning rate."""
    patience: int | None = Field(None, ge=1, le=10_000)
    """Validations without improvement before training stops and the best model is kept; None: all steps are taken."""
    validate_every: int = Field(250, ge=1, le=10_000_000)
    """Steps between validations."""
    queries: int = Field(128, ge=8, le=65_536)
    """Fresh sequences per step and subject on which decoded networks are evaluated."""
    several: float = Field(0.1, ge=0, le=1)
    """Share of the edits in training that add one behaviour and remove another."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay, except of the steering directions."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the exponential moving average of the parameters, which is the final model; 0: no average."""
    compile: bool = False
    """Whether to use ``torch.compile``, which takes a minute at the start and speeds up steps on a GPU."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.schedule != "plateau":
            yield "plateau_patience", "schedule is not plateau"


class CrossmodalSpec(TrainedSpec):
    """Signature -> latent -> weights, with the latent space organised by behaviour."""

    zoo: ArtifactRef
    """The zoo to learn from."""
    codec: CodecSpec = CodecSpec()
    """Architecture."""
    loss: LossSpec = LossSpec()
    """Objective."""
    training: CodecTrainingSpec = CodecTrainingSpec()
    """Optimisation."""
    held_out: float = Field(0.125, gt=0, lt=1)
    """Share of the subjects held out for evaluation."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the subjects held out for the validation loss."""
    hub: HubSpec | None = None
    """Model repository to upload the codec to; encoder and decoder are separate files."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if not self.loss.runs_networks:
            for name in ("queries", "several"):
                yield f"training.{name}", "there is neither behavior nor steering nor direct in the loss"
