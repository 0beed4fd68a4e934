"""What an evaluation says, in sentences that are derived from its figures."""

from __future__ import annotations

from collections.abc import Mapping

from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import LOOKUPS, MIN_AVAILABLE, OPERATIONS
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
    lookup that passes most, on the edits for which that has a network; and what the signature determines
    (``ambiguity``: :func:`services.zoo.oracle.ambiguity`).

    A lookup that has a network for fewer than ``MIN_AVAILABLE`` of the edits is not compared. An edit that changes
    nothing keeps everything: ``kept`` is better only where the target gate is passed as often.
    """
    sentences, compared = [], dict[str, tuple[float, float, str]]()
    for operation, prefix in prefixes(figures, spec).items():
        controls = max(figures[f"{prefix}.{name}.all_gate"] for name in ("null", "random", "reverse"))
        lookups = {way: figures[name] for way in LOOKUPS if (name := f"{operation}.{way}.all_gate") in figures}
        available = {way: figures[f"{operation}.{way}.available"] for way in lookups}
        shares = {way: f" (of the {share:.3f} for which it has a network)" for way, share in available.items()}
        shares |= {way: "" for way, share in available.items() if share == 1}
        passed, kept = (figures[f"{prefix}.{name}"] for name in ("all_gate", "kept_mean"))
        sentence = (
            f"{operation}: {passed:.3f} of the edits pass both gates (target >= {TARGET_GATE}, local >= {LOCAL_GATE}), "
            f"and they keep {kept:.3f} of the source's other answers. At most {controls:.3f} of the controls pass"
        )
        listed = ", ".join(f"{way} {lookup_passed:.3f}{shares[way]}" for way, lookup_passed in lookups.items())
        sentences.append(f"{sentence}; of the lookups {listed}." if lookups else f"{sentence}.")
        comparable = [way for way in lookups if available[way] >= MIN_AVAILABLE]
        if comparable:
            best = max(comparable, key=lambda way: lookups[way])
            pairs = {
                name: (figures[f"{prefix}.where_{best}.{name}"], figures[f"{operation}.{best}.{name}"])
                for name in (*_COMPARED, "target_gate")
            }
            edit_gate, lookup_gate = pairs.pop("target_gate")
            if edit_gate <= lookup_gate - SAME and pairs["kept_mean"][0] > pairs["kept_mean"][1]:
                del pairs["kept_mean"]
            against = best if available[best] == 1 else f"{best} where it has a network"
            compared |= {f"{operation}: {_COMPARED[name]}": (*pair, against) for name, pair in pairs.items()}
    if "nearest_train.agreement" in figures:
        pair = figures["agreement"], figures["nearest_train.agreement"]
        compared["agreement without an edit"] = (*pair, "nearest_train")
    for title, sign in (("better", 1), ("worse", -1)):
        cases = [
            f"{label} ({codec_value:.3f} against {lookup_value:.3f} of {against})"
            for label, (codec_value, lookup_value, against) in compared.items()
            if sign * (codec_value - lookup_value) >= SAME
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
