"""Summarise the pipeline's health as the status lines of a diagnostic_msgs/DiagnosticArray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from bevperception.streaming.cameras import CameraReport, CameraState
from bevperception.streaming.pipeline import Health
from bevperception.streaming.settings import NodeSettings


class Level(IntEnum):
    """Severity of a status line, numbered as in diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


@dataclass(frozen=True)
class Status:
    """One line of diagnostics.

    Attributes:
        name: of the part.
        level: how bad it is.
        message: in plain words.
        values: details.
    """

    name: str
    level: Level
    message: str
    values: Mapping[str, str] = field(default_factory=dict)


def statuses(health: Health, settings: NodeSettings, running: bool, active_s: float) -> list[Status]:
    """Status lines of perception as a whole, each camera, ego motion, synchronisation and timing.

    Args:
        health: of the pipeline.
        settings: thresholds.
        running: whether results are expected; false while switched off.
        active_s: since when they are.
    """
    return [
        _whole(health, settings, running, active_s),
        *(_camera(channel, report) for channel, report in health.cameras.items()),
        _motion(health, settings),
        _synchronisation(health),
        _timing(health),
    ]


def inactive(reason: str) -> list[Status]:
    """Status line of a node that is not active."""
    return [Status("perception", Level.OK, reason)]


def _whole(health: Health, settings: NodeSettings, running: bool, active_s: float) -> Status:
    values = {
        "results": str(health.published),
        "sets without result": str(health.refused),
        "cameras used": f"{health.usable} of {len(health.cameras)}",
        "rate": f"{health.rate_hz:.2f} Hz",
        "memory resets": _listed(health.resets),
    }
    if not running:
        return Status("perception", Level.OK, "inference is switched off", values)
    silent_s = active_s if health.since_result_s is None else min(active_s, health.since_result_s)
    since = f"no result for {silent_s:.1f} s" if silent_s >= settings.warn_after_s else ""
    missing = [c for c, report in health.cameras.items() if report.state is not CameraState.ACTIVE]
    without = f"without {', '.join(missing)}" if missing else ""
    problems = "; ".join(part for part in (since, health.note, without) if part)
    if silent_s >= settings.error_after_s:
        return Status("perception", Level.ERROR, problems, values)
    if problems:
        return Status("perception", Level.WARN, problems, values)
    return Status("perception", Level.OK, "running", values)


def _camera(channel: str, report: CameraReport) -> Status:
    values = {name: str(count) for name, count in sorted(report.counts.items())}
    values |= {"state": report.state.value, "rate": f"{report.rate_hz:.2f} Hz"}
    if report.age_s is not None:
        values["newest image"] = f"{report.age_s:.2f} s ago"
    if report.state is CameraState.ACTIVE:
        level = Level.WARN if report.reason else Level.OK
    else:
        level = Level.ERROR if report.state is CameraState.STALE else Level.WARN
    words = f"{report.state.value}: {report.reason}" if report.reason else report.state.value
    return Status(f"camera {channel}", level, words, values)


def _motion(health: Health, settings: NodeSettings) -> Status:
    if settings.motion_source == "none":
        return Status("ego motion", Level.OK, "not used: each frame stands alone")
    if not health.motion:
        return Status("ego motion", Level.OK, "known")
    outcome = {
        "single_frame": "each frame stands alone, without memory",
        "stop": "nothing is published",
    }[settings.without_motion]
    return Status("ego motion", Level.WARN, f"{health.motion}; {outcome}")


def _synchronisation(health: Health) -> Status:
    values = {name: str(count) for name, count in sorted(health.counts.items())}
    return Status("synchronisation", Level.OK, f"{health.trigger} opens sets", values)


def _timing(health: Health) -> Status:
    values = {}
    for name, (p50, p95) in health.stages_ms.items():
        values[f"{name} p50"], values[f"{name} p95"] = f"{p50:.1f} ms", f"{p95:.1f} ms"
    latency = health.stages_ms.get("latency")
    words = "no result yet" if latency is None else f"latency {latency[0]:.0f} ms, p95 {latency[1]:.0f} ms"
    return Status("timing", Level.OK, words, values)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items())) or "none"
