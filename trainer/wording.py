"""Numbers, sizes and findings in words, the same at the shell, in the app and in reports."""

from __future__ import annotations

from trainer.comparison import Finding

VERDICTS = {"significant": "significant", "noise": "within the noise", "unknown": "cannot be told",
            "not comparable": "cannot be compared"}


def sentence(finding: Finding) -> str:
    """A finding with its verdict and what that rests on."""
    return f"{claim(finding)}: {VERDICTS[finding.verdict]} ({finding.why})"


def claim(finding: Finding) -> str:
    """What was found of two settings, without how sure it is."""
    head = f"{finding.measure}{' ×10³' if finding.measure == 'KID' else ''}: "
    if finding.verdict == "not comparable":
        return f"{head}{finding.best} and {finding.other}"
    gap = "" if finding.difference is None else f" by {number(finding.difference, 3)}"
    if finding.low is not None and finding.high is not None:
        gap += f" (95 %: {number(finding.low, 3)} to {number(finding.high, 3)})"
    return f"{head}{finding.best} is below {finding.other}{gap}"


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def size(count: float | None) -> str:
    if count is None:
        return "–"
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / unit:.3g} {name}"
