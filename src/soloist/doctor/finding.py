"""What a check has found: what, why it matters, and the remedy."""

from __future__ import annotations

from typing import Literal

from soloist.specs.model import Spec

Severity = Literal["ok", "note", "warning", "error"]
ORDER: tuple[Severity, ...] = ("ok", "note", "warning", "error")


class Finding(Spec, frozen=True, kw_only=True):
    """`error`: the deployment will fail or give wrong speed for certain; `warning`: it may; `note`: worth knowing."""

    check: str
    severity: Severity
    what: str
    why: str = ""
    remedy: str = ""
    host: str = ""  # where several are examined


def ok(check: str, what: str) -> Finding:
    return Finding(check=check, severity="ok", what=what)


def note(check: str, what: str, why: str, remedy: str = "") -> Finding:
    return Finding(check=check, severity="note", what=what, why=why, remedy=remedy)


def warning(check: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(check=check, severity="warning", what=what, why=why, remedy=remedy)


def error(check: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(check=check, severity="error", what=what, why=why, remedy=remedy)


def exit_code(findings: list[Finding], strict: bool = False) -> int:
    """1 if anything is an error, or, where that is asked for, a warning."""
    worst = max((ORDER.index(finding.severity) for finding in findings), default=0)
    return int(worst >= ORDER.index("warning" if strict else "error"))
