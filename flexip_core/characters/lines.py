"""The pass lines of the adapters, on what sweep.py wrote: set before the runs, none moved to fit a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .words import STAGING

Results = Mapping[str, Any]
"""Mode ("named", "open") -> sweep.summary, "controls" -> numbers, "base" -> measure.of_base."""

BASE_OBEYS = 0.95
IDENTITY_AT_1, IDENTITY_AT_0 = 0.8, 0.6  # of the judge's ceiling; of what gate 1 reaches
TEXT_KEPT, UP_TO = 0.9, 0.7
COPIED = ("expression", "clothes", "ground")
COPIED_AT_1, COPIED_AT_0 = 0.8, 0.4
TIMES_BASELINE = 2.0
JUMP = 0.35


@dataclass(frozen=True)
class Outcome:
    claim: str
    numbers: dict[str, float]
    passed: bool

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in self.numbers.items())
        return f"{'pass' if self.passed else 'MISSED'}: {self.claim} ({numbers})"


def base_obeys(run: Results) -> Outcome:
    numbers = {slot: run["base"]["untold"][slot] for slot in STAGING}
    return Outcome("the base obeys text", numbers, min(numbers.values()) >= BASE_OBEYS)


def identity_moves(run: Results) -> Outcome:
    curve, ceiling = run["named"]["curves"]["parts"], run["named"]["real"]["parts"]
    numbers = {"parts at gate 0": curve[0], "at gate 1": curve[-1], "ceiling": ceiling}
    passed = curve[-1] >= IDENTITY_AT_1 * ceiling and curve[0] <= IDENTITY_AT_0 * curve[-1]
    return Outcome("identity rises with the gate", numbers, passed)


def text_kept(run: Results) -> Outcome:
    curves, gates = run["named"]["curves"], run["named"]["gates"]
    until = sum(gate <= UP_TO + 1e-9 for gate in gates)
    numbers = {slot: min(curves[f"{slot} of the text"][:until]) for slot in STAGING}
    return Outcome(f"text is obeyed up to gate {UP_TO}", numbers, min(numbers.values()) >= TEXT_KEPT)


def open_prompts_copy(run: Results) -> Outcome:
    curves = {slot: run["open"]["curves"][f"{slot} of the reference"] for slot in COPIED}
    numbers = {
        f"{slot} at gate {gate}": curve[place] for slot, curve in curves.items() for gate, place in ((0, 0), (1, -1))
    }
    passed = all(curve[0] <= COPIED_AT_0 and curve[-1] >= COPIED_AT_1 for curve in curves.values())
    return Outcome("what the text leaves open comes from the reference", numbers, passed)


def wider_than(run: Results, baseline: Results) -> Outcome:
    """The range of the parts against that of an IP-Adapter's weight; one whose identity falls has no useful range at all."""
    own, theirs = _range(run), _range(baseline)
    passed = own > 0 and own >= TIMES_BASELINE * max(theirs, 0.0)
    return Outcome(
        "the gate reaches twice as far as an IP-Adapter's weight", {"own": own, "IP-Adapter": theirs}, passed
    )


def _range(run: Results) -> float:
    curves = [run["open"]["curves"][f"{slot} of the reference"] for slot in COPIED]
    return sum(curve[-1] - curve[0] for curve in curves) / len(curves)


def continuous(run: Results) -> Outcome:
    numbers = {
        f"{mode}, {name}": run[mode]["jump share"][name] for mode in ("named", "open") for name in ("parts", "likeness")
    }
    return Outcome("mean curves do not jump", numbers, max(numbers.values()) <= JUMP)


def causal(run: Results) -> Outcome:
    numbers = dict(run["controls"])
    theirs, mine, none = numbers.values()
    chance = run["base"]["untold"]["parts"]
    curve = run["named"]["curves"]["parts"]
    passed = theirs >= IDENTITY_AT_1 * curve[-1] and max(mine, none) <= chance + 0.1
    return Outcome("parts come from the reference that is given", {**numbers, "chance": chance}, passed)


def outcomes(run: Results, baseline: Results | None = None) -> list[Outcome]:
    found = [base_obeys(run), identity_moves(run), text_kept(run), open_prompts_copy(run), continuous(run), causal(run)]
    return [*found, wider_than(run, baseline)] if baseline else found
