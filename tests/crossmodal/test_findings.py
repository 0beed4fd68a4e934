"""The sentences of a summary follow from the figures."""

from __future__ import annotations

from typing import Any

from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import LOOKUPS
from services.crossmodal.findings import findings, prefixes
from tests.crossmodal.conftest import tiny_spec

SPEC = tiny_spec()


def figures(**given: float) -> dict[str, float]:
    """Figures of additions, of an edit that passes half of the time; ``given`` with ``__`` for dots."""
    scores = {"all_gate": 0.5, "target_gate": 0.6, "target_mean": 0.9, "kept_mean": 0.96}
    base: dict[str, float] = {"agreement": 0.94, "nearest_train.agreement": 0.98}
    base |= {f"add.{name}": value for name, value in scores.items()}
    base |= {f"add.{control}.all_gate": 0.0 for control in ("null", "random", "reverse")}
    for way, passed in (("same_label", 0.775), ("nearest_train", 0.3), ("centroid", 0.35)):
        base |= {f"add.{way}.{name}": value for name, value in scores.items()}
        base |= {f"add.{way}.all_gate": passed, f"add.{way}.available": 1.0}
    base |= {name.replace("__", "."): value for name, value in given.items()}
    # The same as on all edits, but where `given` says otherwise.
    same = {f"add.where_{way}.{name}": base[f"add.{name}"] for way in LOOKUPS for name in scores}
    return same | base


def said(spec: CrossmodalSpec = SPEC, ambiguity: str = "", **given: float) -> str:
    return "\n".join(findings(figures(**given), spec, ambiguity))


def test_a_lookup_that_passes_more_often_is_said_to() -> None:
    text = said(add__same_label__kept_mean=0.98, add__random__all_gate=0.04)
    assert "add: 0.500 of the edits pass both gates" in text and "keep 0.960 of the source's other answers" in text
    ways = "same_label 0.775, nearest_train 0.300, centroid 0.350"
    assert f"At most 0.040 of the controls pass; of the lookups {ways}." in text
    assert "better than a lookup: nothing of this." in text
    worse = text.partition("worse than a lookup: ")[2]
    assert "add: both gates (0.500 against 0.775 of same_label)" in worse
    assert "add: kept (0.960 against 0.980 of same_label)" in worse
    assert "agreement without an edit (0.940 against 0.980 of nearest_train)" in worse
    # Equal figures are neither.
    assert "add: target" not in text


def test_an_edit_that_passes_more_often_is_said_to_and_the_best_lookup_is_compared() -> None:
    text = said(add__all_gate=0.98, add__same_label__all_gate=0.2, add__centroid__kept_mean=0.7, agreement=0.99)
    better, _, worse = text.partition("better than a lookup: ")[2].partition("worse than a lookup: ")
    assert "add: both gates (0.980 against 0.350 of centroid)" in better
    assert "add: kept (0.960 against 0.700 of centroid)" in better
    assert "agreement without an edit (0.990 against 0.980 of nearest_train)" in better
    assert worse.startswith("nothing of this.")


def test_an_edit_that_does_less_keeps_more_which_is_no_merit() -> None:
    text = said(add__target_gate=0.1, add__target_mean=0.2, add__kept_mean=0.99)
    assert "better than a lookup: nothing of this" in text and "add: kept" not in text
    assert "add: kept (0.990 against 0.960 of same_label)" in said(add__target_gate=0.599, add__kept_mean=0.99)


def test_differences_of_less_than_half_a_percent_are_none() -> None:
    text = said(add__all_gate=0.772, agreement=0.9849, add__same_label__target_mean=0.9049)
    assert text.count("nothing of this") == 2


def test_edits_that_no_lookup_has_a_network_for() -> None:
    some = said(add__same_label__available=0.6, add__where_same_label__all_gate=0.7)
    share = "same_label 0.775 (of the 0.600 for which it has a network), nearest_train 0.300, centroid"
    assert share in some
    # Both on the same edits.
    assert "add: both gates (0.700 against 0.775 of same_label where it has a network)" in some
    few = said(add__same_label__available=0.49)
    assert "same_label 0.775 (of the 0.490" in few and "both gates (0.500 against 0.350 of centroid)" in few
    none = said(add__same_label__available=0.1, add__nearest_train__available=0.1, add__centroid__available=0.1)
    assert "worse than a lookup: agreement without an edit" in none and "both gates (0" not in none
    text = "\n".join(findings({k: v for k, v in figures().items() if not any(way in k for way in LOOKUPS)}, SPEC, ""))
    assert "add: 0.500" in text and "lookup" not in text


def test_edits_of_a_codec_for_direct_ones_are_the_direct_ones() -> None:
    direct: Any = tiny_spec(loss={"steering": 0.0, "direct": 3.0})
    given = {f"direct.{name}": value for name, value in figures().items() if name.startswith("add.")}
    given["direct.add.all_gate"] = 0.9
    assert prefixes(figures() | given, direct) == {"add": "direct.add"}
    assert prefixes(figures() | given, SPEC) == {"add": "add"}
    assert "add: 0.900 of the edits" in "\n".join(findings(figures() | given, direct, ""))


def test_the_oracle_and_signatures_that_determine_nothing_are_mentioned() -> None:
    assert "Least squares" not in said() and "cannot determine" not in said()
    assert "agrees with the source in 0.999 of the answers, the codec's decoding in 0.940" in said(
        oracle__agreement=0.999
    )
    assert "cannot determine the weights: two numbers." in said(ambiguity="two numbers")
    assert "cannot determine" not in said(tiny_spec(codec={"inputs": "both"}), ambiguity="two numbers")
