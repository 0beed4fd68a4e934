"""The science without the platform: a zoo, a codec, and a network that gains a behaviour.

.venv/bin/python examples/library.py
"""

from __future__ import annotations

from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CodecSpec, CodecTrainingSpec, CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, PatternSpec, SubjectTrainingSpec
from services.crossmodal.train import train
from services.generation.pipeline import generate
from services.runtime.console import ConsoleRun
from services.zoo.subjects import select


def main() -> None:
    run = ConsoleRun()  # progress bars; leave it out for silence
    zoo = generate(
        GenerationSpec(
            subjects=160,
            vocab_size=5,
            sequence_length=5,
            patterns=[
                PatternSpec(name="starts_with", token="A"),
                PatternSpec(name="ends_with", token="B"),
                PatternSpec(name="first_last_match"),
                PatternSpec(name="no_repeats"),
            ],
            max_patterns_per_batch=3,
            training=SubjectTrainingSpec(steps=300, learning_rate=2e-2),
        ),
        run,
    )
    codec = train(
        CrossmodalSpec(
            zoo=ArtifactRef(artifact="in-memory"),
            codec=CodecSpec(latent_dim=32, hidden_dim=128),
            training=CodecTrainingSpec(steps=400, batch_size=64, queries=128),
        ),
        zoo,
        run,
    )
    without = (~zoo.labels[:, 0]).nonzero().squeeze(1)[:8]
    networks = select(zoo.params, without)
    steered, _ = codec.steer(networks, [("add", zoo.patterns[0].name)])
    before, after = (codec.evaluate(params)[0][:, 0] for params in (networks, steered))
    print(f"recall of {zoo.patterns[0].name} before: {[round(x, 2) for x in before.tolist()]}")
    print(f"recall of {zoo.patterns[0].name} after:  {[round(x, 2) for x in after.tolist()]}")


if __name__ == "__main__":
    main()
