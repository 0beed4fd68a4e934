"""What an evaluation says, in sentences that are derived from its figures."""

from __future__ import annotations

from collections.abc import Mapping

from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import OPERATIONS
from services.crossmodal.baselines import LOOKUPS
from services.crossmodal.steering import LOCAL_GATE, TARGET_GATE

SAME = 0.005
"""Figures that differ by less count as equal."""
_COMPARED = {"all_gate": "both gates", "target_mean": "target", "kept_mean": "kept"}
"""Figures of an edit and of a lookup that are compared, and how they are called."""


def prefixes(figures: Mapping[str, float], spec: CrossmodalSpec) -> dict[str, str]:
    """Of each operation with edits, the prefix of its figures: direct edits where training was on these alone."""
    mode = "direct." if spec.loss.direct and not spec.loss.steering else ""
    return {name: f"{mode}{name}" for name in OPERATIONS if f"{mode}{name}.all_gate" in figures}


def findings(figures: Mapping[str, float], spec: CrossmodalSpec, ambiguity: str) -> list[str]:
    """Sentences on how many edits pass, beside controls and lookups; what the edit does better and worse than the
    lookup that passes most; and what the signature determines (``ambiguity``: :func:`services.zoo.oracle.ambiguity`).

    An edit that changes nothing keeps everything: ``kept`` is better only where the target gate is passed as often.
    """
    sentences, compared = [], dict[str, tuple[float, float, str]]()
    for operation, prefix in prefixes(figures, spec).items():
        controls = max(figures[f"{prefix}.{name}.all_gate"] for name in ("null", "random", "reverse"))
        lookups = {way: figures[name] for way in LOOKUPS if (name := f"{operation}.{way}.all_gate") in figures}
        passed, kept = (figures[f"{prefix}.{name}"] for name in ("all_gate", "kept_mean"))
        sentence = (
            f"{operation}: {passed:.3f} of the edits pass both gates (target >= {TARGET_GATE}, local >= {LOCAL_GATE}), "
            f"and they keep {kept:.3f} of the source's other answers. At most {controls:.3f} of the controls pass"
        )
        ways = []
        for way, share in lookups.items():
            available = figures[f"{operation}.{way}.available"]
            some = f" (of the {available:.3f} for which it has a network)" if available < 1 else ""
            ways.append(f"{way} {share:.3f}{some}")
        sentences.append(f"{sentence}; of the lookups {', '.join(ways)}." if ways else f"{sentence}.")
        if lookups:
            best = max(lookups, key=lambda way: lookups[way])
            pairs = {
                name: (figures[f"{prefix}.{name}"], figures[f"{operation}.{best}.{name}"])
                for name in (*_COMPARED, "target_gate")
            }
            own, other = pairs.pop("target_gate")
            if own <= other - SAME and pairs["kept_mean"][0] > pairs["kept_mean"][1]:
                del pairs["kept_mean"]
            compared |= {f"{operation}: {_COMPARED[name]}": (*pair, best) for name, pair in pairs.items()}
    if "nearest_train.agreement" in figures:
        pair = figures["agreement"], figures["nearest_train.agreement"]
        compared["agreement without an edit"] = (*pair, "nearest_train")
    for title, sign in (("better", 1), ("worse", -1)):
        cases = [
            f"{label} ({own:.3f} against {other:.3f} of {way})"
            for label, (own, other, way) in compared.items()
            if sign * (own - other) >= SAME
        ]
        if compared:
            sentences.append(f"What the codec does {title} than a lookup: {'; '.join(cases) or 'nothing of this'}.")
    if (solved := figures.get("oracle.agreement")) is not None:
        sentences.append(
            f"Least squares from the raw signatures, without learning, agrees with the source in {solved:.3f} of the "
            f"answers, the codec's decoding in {figures['agreement']:.3f}."
        )
    return [*sentences, *([warning(ambiguity)] if ambiguity and spec.codec.inputs == "signature" else [])]


def warning(ambiguity: str) -> str:
    """What to know, and to do, about a codec whose encoder sees signatures that cannot determine the weights."""
    return (
        f"The encoder sees signatures alone, and they cannot determine the weights: {ambiguity}. Decoded weights are a "
        "guess from similar networks. Make the zoo with signature.methods=[] (raw) on enough probes, or set "
        "codec.inputs=both."
    )
