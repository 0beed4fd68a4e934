"""The files of a codec: ``config.json``, and ``encoder``, ``decoder``, ``directions``, ``sequences`` and, where
networks are canonicalised, ``references`` as safetensors. Each file names the run that it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import DIRECTIONS, Direction
from ethogram.specs.generation import PatternSpec, SignatureSpec
from services.crossmodal.canonical import Canonicalizer
from services.crossmodal.data import Preprocessor
from services.crossmodal.model import EncoderDecoder
from services.crossmodal.steering import Probe
from services.runtime.reading import reading
from services.runtime.tensors import write_tensors
from services.zoo.layout import Layout
from services.zoo.patterns import Pattern, from_specs, membership
from services.zoo.pools import Evaluation
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, encode, flatten, unflatten

FORMAT = 5

Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, ...] = ("encoder", "decoder")


@dataclass(frozen=True)
class Contents:
    """What a codec consists of, as its files hold it."""

    spec: CrossmodalSpec
    zoo: str
    """Digest of the zoo that it was trained on."""
    signature: SignatureSpec
    patterns: tuple[Pattern, ...]
    positives: tuple[int, ...]
    """Training subjects that have each pattern."""
    probes: Tensor
    preprocessor: Preprocessor
    evaluation: Evaluation
    support: Evaluation
    model: EncoderDecoder
    probe: Probe
    fixed: Mapping[Direction, Tensor]
    """The directions that are computed from the latents rather than learned, ``[behaviors, latent]`` each."""


def write(contents: Contents, folder: Path) -> None:
    """Write a codec into ``folder``, which is made where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: getattr(contents.model, name).state_dict() for name in PARTS}
    digest = hashlib.sha256(contents.spec.model_dump_json().encode())
    for state in states.values():
        for value in state.values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
    run = {"run": digest.hexdigest()[:16]}
    for name, state in states.items():
        write_tensors(folder / f"{name}.safetensors", state, run)
    directions: dict[str, Tensor] = dict(contents.fixed.items())
    directions |= {"probe": contents.probe.weights, "probe_bias": contents.probe.bias}
    directions["learned"] = contents.model.directions
    write_tensors(folder / "directions.safetensors", directions, run)
    sequences = {"probes": contents.probes}
    for kind, held_out in (("evaluation", contents.evaluation), ("support", contents.support)):
        sequences |= {kind: held_out.sequences, f"{kind}_stratum": held_out.stratum}
    write_tensors(folder / "sequences.safetensors", sequences, run)
    canonicalizer = contents.preprocessor.canonicalizer
    if canonicalizer is not None:
        references = {str(i): flatten(network)[0] for i, network in enumerate(canonicalizer.references)}
        write_tensors(folder / "references.safetensors", references, run)
    config = {
        "format": FORMAT,
        **run,
        "spec": contents.spec.model_dump(mode="json"),
        "zoo": contents.zoo,
        "shapes": [shape._asdict() for shape in contents.preprocessor.layout.shapes],
        "signature": contents.signature.model_dump(mode="json"),
        "canonical": canonicalizer is not None,
        "behaviors": [
            {"pattern": p.spec.model_dump(mode="json"), "name": p.name, "description": p.description, "positives": n}
            for p, n in zip(contents.patterns, contents.positives, strict=True)
        ],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def read(folder: Path, parts: Sequence[Part] = PARTS) -> Contents:
    """Read what :func:`write` wrote, of encoder and decoder only ``parts``. Raises :class:`InvalidInput` for a file
    that is missing, wrong, or of another run."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise InvalidInput.field("parts", f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    with _reading(folder, "config.json") as path:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise InvalidInput.field(path.name, f"has format {config['format']!r}; this version reads {FORMAT}")
        spec = CrossmodalSpec.model_validate(config["spec"])
        signature = SignatureSpec.model_validate(config["signature"])
        shapes = [Architecture(**{**shape, "hidden": tuple(shape["hidden"])}) for shape in config["shapes"]]
        layout = Layout(shapes)
        behaviors = config["behaviors"]
        pattern_specs = [PatternSpec.model_validate(entry["pattern"]) for entry in behaviors]
        patterns = tuple(from_specs(pattern_specs, shapes[0].vocab_size, shapes[0].length, f"{path.name}.behaviors"))
        positives = tuple(int(entry["positives"]) for entry in behaviors)
        run, zoo = config["run"], str(config["zoo"])
    with _reading(folder, "sequences.safetensors") as path:
        sequences = _load(path, run)
        probes = sequences["probes"]
        evaluation, support = (
            Evaluation(sequences[name], membership(patterns, sequences[name]), sequences[f"{name}_stratum"])
            for name in ("evaluation", "support")
        )
        inputs = encode(layout.envelope, probes)
        extractor = ActivationSignatureExtractor(signature, inputs, membership(patterns, probes))
    canonicalizer = None
    if config["canonical"]:
        with _reading(folder, "references.safetensors") as path:
            flat = _load(path, run)
            references = [unflatten(flat[str(i)].unsqueeze(0), shape) for i, shape in enumerate(shapes)]
            canonicalizer = Canonicalizer(layout, inputs, references)
    preprocessor = Preprocessor(spec.codec.inputs, layout, extractor, canonicalizer)
    model = EncoderDecoder(spec.codec, preprocessor, len(patterns), torch.Generator())
    for name in PARTS:
        if name not in parts:
            delattr(model, name)
            continue
        with _reading(folder, f"{name}.safetensors") as path:
            getattr(model, name).load_state_dict(_load(path, run))
    with _reading(folder, "directions.safetensors") as path:
        directions = _load(path, run)
        model.load_state_dict({"directions": directions["learned"]}, strict=False)
        fixed: dict[Direction, Tensor] = {kind: directions[kind] for kind in DIRECTIONS if kind != "learned"}
        probe = Probe(directions["probe"], directions["probe_bias"])
        if any(tensor.shape != model.directions.shape for tensor in (*fixed.values(), probe.weights.T)):
            raise ValueError("shapes that differ")
    return Contents(
        spec, zoo, signature, patterns, positives, probes, preprocessor, evaluation, support, model, probe, fixed
    )


def _load(path: Path, run: str) -> dict[str, Tensor]:
    """The tensors of a file of a run. Raises :class:`InvalidInput` for one of another run."""
    with safe_open(path, "pt") as file:
        written_by = (file.metadata() or {}).get("run")
    if written_by != run:
        text = f"is of another run ({written_by}) than config.json ({run}); take both of one"
        raise InvalidInput.field(path.name, text)
    return load_file(path)


_reading = partial(reading, what="codec")
