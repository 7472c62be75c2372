"""What a judge's reply says: its last verdict, its last score, and nothing that it does not say in double brackets."""

import re
from enum import Enum

__all__ = ["Verdict", "parse_score", "parse_verdict"]


class Verdict(Enum):
    """What a judge says of answers A and B. INVALID: it says nothing we know; ERROR: there was no reply to read."""

    A = "A"
    B = "B"
    TIE = "tie"
    INVALID = "invalid"
    ERROR = "error"


def parse_verdict(reply: str) -> Verdict:
    """Read the last verdict in double brackets: [[A]], [[B]], [[C]] or [[tie]], or Arena's five from [[A>>B]] on."""
    found = _VERDICT.findall(reply)
    return _VERDICTS[re.sub(r"\s", "", found[-1]).upper()] if found else Verdict.INVALID


def parse_score(reply: str, lowest: float = 1.0, highest: float = 10.0) -> float | None:
    """Read the last number in double brackets, as in [[7]], [[7.5]] or [[7/10]]; None where it is not on the scale."""
    found = re.findall(r"\[\[\s*([-+]?[0-9][^\[\]]*)\]\]", reply)
    number = (
        re.fullmatch(r"([-+]?[0-9]+(?:\.[0-9]+)?)\s*(?:/\s*([0-9]+(?:\.[0-9]+)?)\s*)?", found[-1]) if found else None
    )
    if not number or (number[2] and float(number[2]) != highest):
        return None
    return score if lowest <= (score := float(number[1])) <= highest else None


_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie|A\s*>\s*>\s*B|A\s*>\s*B|A\s*=\s*B|B\s*>\s*A|B\s*>\s*>\s*A)\s*\]\]", re.I)
_VERDICTS = {
    **dict.fromkeys(["A", "A>B", "A>>B"], Verdict.A),
    **dict.fromkeys(["B", "B>A", "B>>A"], Verdict.B),
    **dict.fromkeys(["C", "TIE", "A=B"], Verdict.TIE),
}
