"""Check nuScenes' tables before the devkit reads them: which records are damaged, which samples are lost.

Every damaged record is found and named; records that cannot be used are taken out, so that the devkit, which
trusts its tables, opens the rest. Samples that a damaged record belongs to are lost. Damage that cannot be
assigned to samples makes the whole tables unusable.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
from nuscenes.eval.detection.utils import category_to_detection_name

from bevperception.data.table_rules import (
    CAMERA_RULES,
    CHAIN_RULES,
    MISSING,
    TABLES,
    Record,
    Rule,
    Tables,
    bad_rows,
    column_of,
    file_token,
    intrinsics,
    is_good,
    table_rules,
)

_WHOLE: Final = ("log", "scene", "sample", "map")
"""Tables whose damage cannot be assigned to samples."""
_ORDER: Final = (
    *("category", "attribute", "visibility", "sensor", "log", "map"),
    *("calibrated_sensor", "instance", "ego_pose", "scene", "sample", "sample_data", "sample_annotation"),
)
"""Tables after those that they refer to; the links between scene and sample are checked separately."""
_MIXED: Final = "the tables come from different downloads, or one was cut short"
_DANGLING: Final = -1
_NO_LINK: Final = -2
_EDITED: Final = "the tables were edited, joined or cut by a program that did not keep their links"


@dataclass(frozen=True)
class Loss:
    """Why a sample cannot be used.

    Attributes:
        channel: of the sensor whose record is damaged; None where the whole sample is.
        reason: a sentence with the table, the record's token, the field and the likely cause.
    """

    channel: str | None
    reason: str


@dataclass
class Damage:
    """Records that are damaged in the same way.

    Attributes:
        first: a sentence about the first of them.
        count: how many.
    """

    first: str
    count: int = 0


@dataclass
class CheckedTables:
    """The sound records, and the damage that :func:`check_tables` took out.

    Attributes:
        tables: records that can be used; changed in place.
        lost: by sample token, why it cannot be used.
        cameras: tokens of the calibrated_sensor records that are cameras.
        damages: by table, field and likely cause.
        fatal: sentences about damage that makes the whole unusable; the rest is incomplete if there are any.
    """

    tables: Tables
    lost: dict[str, list[Loss]] = field(default_factory=dict)
    cameras: set[str] = field(default_factory=set)
    damages: dict[tuple[str, str, str], Damage] = field(default_factory=dict)
    fatal: list[str] = field(default_factory=list)


def check_tables(tables: Tables) -> CheckedTables:
    """Check all tables against each other.

    Args:
        tables: the 13 of :data:`~bevperception.data.table_rules.TABLES`, each a list of objects; records
            that cannot be used are taken out, and links to them are cut.
    """
    check = _Check(tables)
    for table in TABLES:
        check.tokens(table)
    for table in _ORDER:
        if not check.result.fatal:
            check.records(table)
    return check.result


def show(value: object) -> str:
    """Shorten a value of any size to a few printable characters."""
    return _SHORT.repr(value)


_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class _Check:
    """The state of one check; tables are looked at in an order in which each refers to sound records only."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.result = CheckedTables(tables)
        self._sound: dict[str, set[str]] = {}
        self._broken: dict[str, dict[str, str]] = {}
        self._channels: dict[str, str] = {}
        self._columns: dict[tuple[str, str], list[Any]] = {}

    def tokens(self, table: str) -> None:
        """Check that tokens are unique; of several records with one token the first stays."""
        records = self.tables[table]
        column = self._column(table, "token")
        rule = file_token()
        unnamed = [self._fault(table, records[row], "token", rule) for row in bad_rows(rule, column)]
        if unnamed:
            # No link can lead to such a record, so what it belongs to is unknown.
            self.result.fatal += unnamed
            return
        self._sound[table] = set(column)
        if len(self._sound[table]) == len(column):
            return
        known: set[str] = set()
        faults: dict[int, str] = {}
        for row, token in enumerate(column):
            if token in known:
                faults[row] = self._say(table, token, "token", "is that of an earlier record too", _EDITED)
            known.add(token)
        if table in _WHOLE:
            self.result.fatal += faults.values()
        self._take_out(table, faults, duplicates=True)

    def records(self, table: str) -> None:
        """Check the fields of a table, then how its records fit together."""
        records = self.tables[table]
        faults: dict[int, str] = {}
        for field_name, rule in table_rules(table, self._sound).items():
            self._find_faults(table, field_name, rule, None, faults)
        if table in _WHOLE and faults:
            self.result.fatal += faults.values()
            return
        if table == "calibrated_sensor":
            self._cameras(records, faults)
        if table == "sample_data":
            mounts = self._column(table, "calibrated_sensor_token")
            cameras = self.result.cameras
            rows = [r for r, mount in enumerate(mounts) if isinstance(mount, str) and mount in cameras]
            for field_name, rule in CAMERA_RULES.items():
                self._find_faults(table, field_name, rule, rows, faults)
            self._pictures(rows, faults)
        if table == "sample_annotation":
            self._attributes(records, faults)
        self._take_out(table, faults)
        if table == "map":
            self._maps_of_logs()
        if table == "sample":
            self._scenes()
        if table == "sample_data":
            self._only_one(
                "calibrated_sensor_token", table, self._channels, "is a second key frame of its sensor"
            )
            self._links(table, "calibrated_sensor_token", self._channels)
        if table == "sample_annotation":
            self._only_one("instance_token", table, None, "is a second box of its object")
            self._links(table, "instance_token", None)
        self._columns.clear()

    def _column(self, table: str, field_name: str) -> list[Any]:
        """A field of every record, kept until the table changes or the next one's turn comes."""
        key = (table, field_name)
        if key not in self._columns:
            self._columns[key] = column_of(self.tables[table], field_name)
        return self._columns[key]

    def _find_faults(
        self, table: str, field_name: str, rule: Rule, rows: Sequence[int] | None, faults: dict[int, str]
    ) -> None:
        """Find the first fault of every record, or of those at ``rows``, that has none yet."""
        column = self._column(table, field_name)
        chosen = column if rows is None else [column[row] for row in rows]
        for place in bad_rows(rule, chosen):
            row = place if rows is None else rows[place]
            if row not in faults:
                faults[row] = self._fault(table, self.tables[table][row], field_name, rule)

    def _fault(self, table: str, record: Record, field_name: str, rule: Rule) -> str:
        """Describe a fault; of a link to a damaged record, that record's fault."""
        value = record.get(field_name, MISSING)
        if isinstance(value, str) and rule.table is not None:
            known = self._broken.get(rule.table, {}).get(value)
            if known is not None:
                return known
        fault = f"must be {rule.wanted}, got {show(value)}"
        return self._say(table, record.get("token", MISSING), field_name, fault, rule.cause)

    def _say(self, table: str, token: object, field_name: str, fault: str, cause: str) -> str:
        text = f"{table}.json, record {show(token)}: {field_name} {fault}; probably {cause}"
        damage = self.result.damages.setdefault((table, field_name, cause), Damage(text))
        damage.count += 1
        return text

    def _take_out(self, table: str, faults: Mapping[int, str], duplicates: bool = False) -> None:
        """Take records out of a table; the samples that they belong to are lost.

        Args:
            table: its name.
            faults: sentence by row.
            duplicates: another record of the same token stays.
        """
        if not faults:
            return
        records = self.tables[table]
        for row, sentence in faults.items():
            token = records[row]["token"]
            if not duplicates:
                self._broken.setdefault(table, {})[token] = sentence
                self._sound[table].discard(token)
            if table in ("sample_data", "sample_annotation"):
                self._lose(table, records[row], sentence)
        records[:] = [record for row, record in enumerate(records) if row not in faults]
        self._columns.clear()

    def _lose(self, table: str, record: Record, sentence: str) -> None:
        """Mark the sample of a record as lost; if that sample is unknown, the tables are unusable."""
        sample, channel = record.get("sample_token"), None
        if table == "sample_data":
            mount = record.get("calibrated_sensor_token")
            channel = self._channels.get(mount) if isinstance(mount, str) else None
        if isinstance(sample, str) and sample in self._sound["sample"]:
            self._lose_sample(sample, channel, sentence)
        elif table == "sample_annotation" or record.get("is_key_frame") is not False:
            self.result.fatal.append(sentence)

    def _lose_sample(self, sample: str, channel: str | None, sentence: str) -> None:
        losses = self.result.lost.setdefault(sample, [])
        if all(loss.channel != channel for loss in losses):
            losses.append(Loss(channel, sentence))

    def _cameras(self, records: Sequence[Record], faults: dict[int, str]) -> None:
        """Tell cameras from other mounts; check that cameras have a matrix."""
        sensors = {record["token"]: record for record in self.tables["sensor"]}
        rule = intrinsics()
        for row, record in enumerate(records):
            sensor = record.get("sensor_token")
            if not isinstance(sensor, str) or sensor not in sensors:
                continue
            self._channels[record["token"]] = sensors[sensor]["channel"]
            if is_good(rule, [record.get("camera_intrinsic")]):
                self.result.cameras.add(record["token"])
            elif sensors[sensor]["modality"] == "camera" and row not in faults:
                faults[row] = self._fault("calibrated_sensor", record, "camera_intrinsic", rule)

    def _pictures(self, rows: Sequence[int], faults: dict[int, str]) -> None:
        """Check that a camera's pictures have one size, its matrix's, and are no other sensor's files."""
        table, tokens = "sample_data", self._column("sample_data", "token")
        sound = [row for row in rows if row not in faults]
        mounts = self._column(table, "calibrated_sensor_token")
        widths, heights = self._column(table, "width"), self._column(table, "height")
        counts = Counter((mounts[row], widths[row], heights[row]) for row in sound)
        usual: dict[str, tuple[int, int]] = {}
        for (mount, width, height), _ in counts.most_common():
            usual.setdefault(mount, (width, height))
        if len(usual) < len(counts):
            for row in sound:
                size = (widths[row], heights[row])
                if size != usual[mounts[row]]:
                    fault = f"and height must be {usual[mounts[row]]}, as its camera's others, got {size}"
                    faults[row] = self._say(table, tokens[row], "width", fault, _EDITED)
        owner: dict[str, str] = {}
        files, keys = self._column(table, "filename"), self._column(table, "is_key_frame")
        for row, key in enumerate(keys):
            if key and row not in faults:
                channel = self._channels[mounts[row]]
                if owner.setdefault(files[row], channel) != channel:
                    fault = f"{show(files[row])} is a file of {owner[files[row]]} too"
                    faults[row] = self._say(
                        table, self._column(table, "token")[row], "filename", fault, _EDITED
                    )

    def _attributes(self, records: Sequence[Record], faults: dict[int, str]) -> None:
        """Check that a box of a detection class has at most one attribute, one that the devkit knows."""
        names = {r["token"]: r["name"] for r in self.tables["attribute"]}
        unknown = {token for token, known_as in names.items() if known_as not in ATTRIBUTE_NAMES}
        categories = {r["token"]: r["name"] for r in self.tables["category"]}
        instances = {r["token"]: categories[r["category_token"]] for r in self.tables["instance"]}
        for row, tokens in enumerate(self._column("sample_annotation", "attribute_tokens")):
            if not tokens or row in faults or (len(tokens) == 1 and tokens[0] not in unknown):
                continue
            if category_to_detection_name(instances[records[row]["instance_token"]]) is not None:
                fault = f"must be one attribute of nuScenes at most, got {show([names[t] for t in tokens])}"
                token = records[row]["token"]
                faults[row] = self._say("sample_annotation", token, "attribute_tokens", fault, _EDITED)

    def _maps_of_logs(self) -> None:
        known = {token for record in self.tables["map"] for token in record["log_tokens"]}
        for record in self.tables["log"]:
            if record["token"] not in known:
                fault = "is in the log_tokens of no record of map.json"
                self.result.fatal.append(self._say("log", record["token"], "token", fault, _EDITED))

    def _scenes(self) -> None:
        """Check that every scene is one chain of its samples in order of time; else they are lost."""
        faults: dict[int, str] = {}
        for field_name, rule in CHAIN_RULES.items():
            self._find_faults("sample", field_name, rule, None, faults)
        bad = {self.tables["sample"][row]["token"]: sentence for row, sentence in faults.items()}
        samples_by_scene: dict[str, dict[str, Record]] = {
            record["token"]: {} for record in self.tables["scene"]
        }
        for record in self.tables["sample"]:
            samples_by_scene[record["scene_token"]][record["token"]] = record
        names: set[str] = set()
        for scene in self.tables["scene"]:
            samples = samples_by_scene[scene["token"]]
            if scene["name"] in names:
                fault = "is that of an earlier scene too"
                self.result.fatal.append(self._say("scene", scene["token"], "name", fault, _EDITED))
            if not samples:
                fault = "is not the scene of any sample"
                self.result.fatal.append(self._say("scene", scene["token"], "token", fault, _MIXED))
            names.add(scene["name"])
            damaged = next((bad[token] for token in samples if token in bad), None)
            sentence = damaged or self._chain_fault(scene, samples)
            if sentence is not None:
                self._lose_scene(scene, samples, sentence)

    def _chain_fault(self, scene: Record, samples: Mapping[str, Record]) -> str | None:
        """The reason why the links are not one chain through a scene's samples; None if nothing does."""
        visited: set[str] = set()
        before: Record | None = None
        source, source_field = ("scene", scene["token"]), "first_sample_token"
        token = scene.get("first_sample_token", MISSING)
        while token != "" or before is None:
            fault = None
            if not isinstance(token, str) or token not in samples:
                fault = f"must be the token of a sample of scene {show(scene['name'])}, got {show(token)}"
            elif token in visited:
                fault = f"leads back to {show(token)}: the chain of samples is a circle"
            if fault is not None:
                return self._say(*source, source_field, fault, _EDITED)
            visited.add(token)
            record = samples[token]
            previous = "" if before is None else before["token"]
            if record["prev"] != previous:
                fault = (
                    f"must be {show(previous)}, the sample before it in its scene, got {show(record['prev'])}"
                )
                return self._say("sample", token, "prev", fault, _EDITED)
            if before is not None and not record["timestamp"] > before["timestamp"]:
                fault = f"must be later than {before['timestamp']}, that of the sample before it, got "
                return self._say("sample", token, "timestamp", f"{fault}{record['timestamp']}", _EDITED)
            before, source, source_field, token = record, ("sample", token), "next", record["next"]
        if len(visited) < len(samples):
            fault = f"ends the chain after {len(visited)} of the scene's {len(samples)} samples"
            return self._say(*source, source_field, fault, _EDITED)
        return None

    def _lose_scene(self, scene: Record, samples: Mapping[str, Record], sentence: str) -> None:
        """Lose all samples of a scene; chain them in the table's order, so that the chain has an end."""
        records = list(samples.values())
        for place, record in enumerate(records):
            self._lose_sample(record["token"], None, sentence)
            if not is_good(CHAIN_RULES["timestamp"], [record.get("timestamp")]):
                record["timestamp"] = math.nan
            record["prev"] = records[place - 1]["token"] if place else ""
            record["next"] = records[place + 1]["token"] if place + 1 < len(records) else ""
        if records:
            scene["first_sample_token"], scene["last_sample_token"] = (
                records[0]["token"],
                records[-1]["token"],
            )

    def _only_one(self, of: str, table: str, groups: Mapping[str, str] | None, fault: str) -> None:
        """Check that a sample has one key frame a sensor, and one box an object; the first stays."""
        records = self.tables[table]
        rows: Sequence[int] = range(len(records))
        which, samples = self._column(table, of), self._column(table, "sample_token")
        if groups is not None:
            rows = [row for row, key in enumerate(self._column(table, "is_key_frame")) if key]
            which, samples = [groups[which[row]] for row in rows], [samples[row] for row in rows]
        pairs = list(zip(samples, which, strict=True))
        if len(set(pairs)) == len(pairs):
            return
        known: set[tuple[str, str]] = set()
        faults: dict[int, str] = {}
        for row, pair in zip(rows, pairs, strict=True):
            if pair in known:
                text = f"{show(records[row][of])} {fault} in sample {show(pair[0])}"
                faults[row] = self._say(table, records[row]["token"], of, text, _EDITED)
            known.add(pair)
        self._take_out(table, faults)

    def _links(self, table: str, of: str, groups: Mapping[str, str] | None) -> None:
        """Check that links lead to the same sensor's or object's record before and after; cut others."""
        records = self.tables[table]
        index = {token: row for row, token in enumerate(self._column(table, "token"))}
        index[""] = _NO_LINK
        codes: dict[str, int] = {}
        kinds = self._column(table, of)
        if groups is not None:
            kinds = list(map(groups.__getitem__, kinds))
        group = np.fromiter((codes.setdefault(kind, len(codes)) for kind in kinds), np.int64, len(kinds))
        times = self._times(table)
        for side, sign in (("prev", -1), ("next", 1)):
            target = self._targets(table, side, index)
            rows = np.flatnonzero(target >= 0)
            step = sign * (times[target[rows]] - times[rows])
            same = group[target[rows]] == group[rows]
            # A sample without a time is lost already; what is linked to it has no fault of its own.
            timeless = rows[np.isnan(step)].tolist()
            wrong = rows[~(same & (step > 0)) & ~np.isnan(step)].tolist()
            for row in sorted((*wrong, *np.flatnonzero(target == _DANGLING).tolist())):
                self._cut(table, records[row], side, of)
            for row in timeless:
                records[row][side] = ""

    def _targets(self, table: str, side: str, index: Mapping[str, int]) -> NDArray[np.int64]:
        """Row that every record's link leads to."""
        column = self._column(table, side)
        try:
            return np.fromiter(map(index.get, column, repeat(_DANGLING)), np.int64, len(column))
        except TypeError:  # an unhashable value
            texts = [value if isinstance(value, str) else None for value in column]
            return np.fromiter(
                (index.get(t, _DANGLING) if t is not None else _DANGLING for t in texts), np.int64
            )

    def _cut(self, table: str, record: Record, side: str, of: str) -> None:
        """Remove a wrong link; one to a damaged record is not reported again."""
        target = record.get(side, MISSING)
        if not (isinstance(target, str) and target in self._broken.get(table, {})):
            when = "earlier" if side == "prev" else "later"
            wanted = f"the token of an {when}" if side == "prev" else f"the token of a {when}"
            fault = f"must be {wanted} record of the same {of.removesuffix('_token')}, or empty"
            self._lose(
                table,
                record,
                self._say(table, record["token"], side, f"{fault}, got {show(target)}", _EDITED),
            )
        record[side] = ""

    def _times(self, table: str) -> NDArray[np.float64]:
        if table == "sample_data":
            return np.array(self._column(table, "timestamp"), dtype=np.float64)
        of_sample = {record["token"]: record["timestamp"] for record in self.tables["sample"]}
        column = self._column(table, "sample_token")
        return np.fromiter(map(of_sample.__getitem__, column), np.float64, len(column))
