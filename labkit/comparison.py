"""What measured rows say: times, shares of the device's limit, ratios to each peer, as figures and as a table."""

import html
import math

import numpy as np

from labkit.gpus import GPUS
from labkit.player import as_html
from labkit.record import CEILING, Row
from labkit.show import html_table
from labkit.timing import MATMUL_FLOPS

TIE = 0.02  # a smaller difference is no difference
FLOORS = ("A100 80GB", "H200", "B200")  # what a case can cost at least is said of these where nothing was measured


class Comparison:
    """Measured rows of some cases, and the figures that a text or a plot needs: None where nothing was measured.

    A case is given by its name; provider None means the kernel itself, `case.op`. Printed or shown in a notebook it
    is a table for each section, with losses as plain as wins, and where the figures come from. Where nothing was
    measured it shows what bytes and operations alone demand.
    """

    def __init__(self, topic, cases, rows, hashes, live=False):
        """cases: `labkit.bench.Case`s; rows of other cases are left out. hashes: of the kernels as they are now."""
        self.topic, self.live = topic, live
        self.cases = {case.name: case for case in cases}
        self.rows = [row for row in rows if row.case in self.cases or row.case == CEILING]
        self._rows = {(row.case, row.provider): row for row in self.rows if row.case != CEILING}
        self._ceilings = {(row.date, row.provider): row for row in self.rows if row.case == CEILING}
        own = {key: row.source_hash for key, row in self._rows.items() if row.source_hash}
        self.changed = sorted({name for (case, name), h in own.items() if hashes.get((case, name)) != h})

    def row(self, case, provider=None) -> Row | None:
        return self._rows.get((case, provider or self.cases[case].op))

    def us(self, case, provider=None) -> float | None:
        """Median microseconds a call."""
        row = self.row(case, provider)
        return float(np.median(row.us)) if row and row.ran else None

    def spread(self, case, provider=None) -> tuple[float, float] | None:
        """20th and 80th percentile, microseconds."""
        row = self.row(case, provider)
        return tuple(float(x) for x in np.percentile(row.us, (20, 80))) if row and row.ran else None

    def gbs(self, case, provider=None) -> float | None:
        """The bytes that have to be moved / time, GB/s."""
        us = self.us(case, provider)
        return us and self.cases[case].bytes / us / 1e3

    def floor(self, case) -> float | None:
        """Microseconds that the bytes need at the copy's bandwidth, or the flops at the matmul's rate if longer.

        Both were measured in the run that measured the case.
        """
        date = next((row.date for row in self._rows.values() if row.case == case), None)
        copy, matmul = self._ceilings.get((date, "copy")), self._ceilings.get((date, "matmul"))
        if not copy:
            return None
        compute = self.cases[case].flops / MATMUL_FLOPS * np.median(matmul.us) if matmul else 0.0
        return float(max(self.cases[case].bytes / copy.bytes * np.median(copy.us), compute))

    def share(self, case, provider=None) -> float | None:
        """Share of the measured limit that is reached: floor / time."""
        us, floor = self.us(case, provider), self.floor(case)
        return floor / us if us and floor else None

    def ratio(self, case, peer, provider=None) -> float | None:
        """Time of the peer / time of the kernel: above 1 the kernel is faster."""
        us, peer_us = self.us(case, provider), self.us(case, peer)
        if not us or not peer_us or self.row(case, provider).mode != self.row(case, peer).mode:
            return None  # one with its launches, the other without: no comparison
        return peer_us / us

    def is_tie(self, case, peer, provider=None) -> bool | None:
        """The difference is below the spread (p80 - p20) of either, or below 2 %."""
        if self.ratio(case, peer, provider) is None:
            return None
        times = self.us(case, provider), self.us(case, peer)
        spreads = self.spread(case, provider), self.spread(case, peer)
        return abs(times[0] - times[1]) < max(TIE * min(times), *(p80 - p20 for p20, p80 in spreads))

    def best_peer(self, case) -> str | None:
        times = {peer: self.us(case, peer) for peer in self.cases[case].peers if self.ratio(case, peer)}
        return min(times, key=times.get, default=None)

    def result(self, case) -> str | None:
        """Against the best peer: "1.25x faster than ...", "tie with ..." or "1.10x slower than ..."."""
        peer = self.best_peer(case)
        ratio = self.ratio(case, peer) if peer else None
        if ratio is None:
            return None
        if self.is_tie(case, peer):
            return f"tie with {peer}"
        return f"{ratio:.2f}x faster than {peer}" if ratio > 1 else f"{1 / ratio:.2f}x slower than {peer}"

    def summary(self, section) -> str:
        """Against the best peer of every case: geometric mean, worst case, and how many are won, tied and lost."""
        results = {c: self.result(c) for c in self._section(section) if self.result(c)}
        if not results:
            return "No comparison with a peer was measured."
        ratios = {c: self.ratio(c, self.best_peer(c)) for c in results}
        mean, worst = math.exp(np.mean(np.log(list(ratios.values())))), min(ratios, key=ratios.get)
        words = ("x faster than", "tie with", "x slower than")
        faster, ties, slower = (sum(word in result for result in results.values()) for word in words)
        return (
            f"Time of the best peer / ours: geometric mean {mean:.2f}, worst {ratios[worst]:.2f} ({worst}). "
            f"Faster in {faster} of {len(results)}, a tie in {ties}, slower in {slower}."
        )

    def provenance(self) -> list[str]:
        """What was measured, where and when; or that nothing was."""
        if not self._rows and self.live:
            return [f"Nothing was measured for {self.topic}: the time was spent before its first case."]
        if not self._rows:
            return [
                "No GPU has measured this yet; `make record` does. The floors are arithmetic: bytes over bandwidth, or "
                "operations over the bf16 rate if that takes longer, both from the datasheets."
            ]
        lines = []
        for row in {row.date: row for row in self._rows.values()}.values():
            lines.append(
                f"{'Measured now' if self.live else 'Recorded'} on {row.device}: {row.date} UTC, commit {row.commit}, "
                f"driver {row.driver}, torch {row.torch}, triton {row.triton}."
            )
            limits = [r for (date, _), r in self._ceilings.items() if date == row.date]
            if limits:
                lines.append("Limits measured in the same run: " + ", ".join(map(_rate, limits)) + ".")
            lines += [f"State of the GPU at the start: {r.verdict}." for r in limits if r.verdict]
        if self.changed:
            lines.append(self._older())
        elif not self.live:
            lines.append("The kernels are unchanged since.")
        return lines

    def source(self) -> str:
        """Where and when, in a line: to stand beside a single figure. It says so if the kernels have changed since."""
        where = self.provenance()[0]
        return f"{where} {self._older()}" if self.changed else where

    def _older(self) -> str:
        return f"Changed since it was measured, so the figures are of older code: {', '.join(self.changed)}."

    def plan(self, section) -> list[list[str]]:
        """Header and one line a case: what it demands, where nothing was measured."""
        lines = [["case", "MB", "operations / byte", *(f"floor us, {name}" for name in FLOORS)]]
        for case in (self.cases[name] for name in self._section(section)):
            floors = (max(case.bytes / GPUS[gpu].bandwidth, case.flops / GPUS[gpu].bf16_flops) for gpu in FLOORS)
            density = _cell(case.flops / case.bytes if case.flops else None)
            us = (_cell(1e6 * x, ".1f" if x > 1e-7 else ".2g") for x in floors)
            lines.append([case.name, _megabytes(case), density, *us])
        return lines

    def planned(self, section) -> str:
        """Who would be timed."""
        cases = [self.cases[name] for name in self._section(section)]
        own = dict.fromkeys(name for case in cases for name in (case.op, *case.variants))
        peers = dict.fromkeys(name for case in cases for name in case.peers)
        return f"To be timed: {', '.join(own)}" + (f"; beside it {', '.join(peers)}." if peers else ".")

    def table(self, section) -> list[list[str]]:
        """Header and one line a case. The cell of a variant or a peer: its time and, in brackets, its time / ours.

        Who was timed on no case of the section has no column; `notes` gives the reason.
        """
        cases = [self.cases[name] for name in self._section(section)]
        others = dict.fromkeys(name for case in cases for name in (*case.variants, *case.peers))
        others = [name for name in others if any(self.us(case.name, name) for case in cases)]
        own = " / ".join(dict.fromkeys(case.op for case in cases))
        figures = ["MB", "limit us", f"{own} us [p20-p80]", "GB/s", "of limit"]
        lines = [["case", *figures, *others, "against the best peer"]]
        for case in cases:
            c = case.name
            us, spread = self.us(c), self.spread(c)
            line = [c, _megabytes(case), _cell(self.floor(c))]
            line.append(f"{us:.1f} [{spread[0]:.1f}-{spread[1]:.1f}]" if us else "-")
            line += [_cell(self.gbs(c), ".0f"), _cell(self.share(c), ".0%")]
            for name in others:
                ratio, us = self.ratio(c, name), _cell(self.us(c, name))
                line.append(f"{us} ({ratio:.2f})" if ratio else us)
            lines.append([*line, self.result(c) or "-"])
        return lines

    def notes(self, section) -> list[str]:
        """Everything that was not timed, with the reason and the cases; and what was timed with its launches."""
        groups = {}
        for c in self._section(section):
            rows = [row for (case, _), row in self._rows.items() if case == c]
            for row in rows:
                if not row.ran:
                    groups.setdefault(f"{row.provider}: {row.verdict}", []).append(c)
                elif row.mode == "eager":
                    groups.setdefault(f"{row.provider}: timed eagerly, launches included", []).append(c)
            if not rows:
                groups.setdefault("not measured", []).append(c)
        total = len(self._section(section))

        def where(names):
            return ", ".join(names) if len(names) <= 3 else f"{len(names)} of {total} cases"

        return [f"{text} ({where(names)})" for text, names in groups.items()]

    def _section(self, section) -> list[str]:
        return [name for name, case in self.cases.items() if case.section == section]

    def _sections(self) -> list[str]:
        return list(dict.fromkeys(case.section for case in self.cases.values())) if self._rows or not self.live else []

    def _shown(self, section):
        """(table, sentence below it, notes) of a section."""
        if not self._rows:
            return self.plan(section), self.planned(section), []
        return self.table(section), self.summary(section), self.notes(section)

    def __repr__(self) -> str:
        lines = []
        for section in self._sections():
            table, sentence, notes = self._shown(section)
            widths = [max(map(len, column)) for column in zip(*table)]
            lines += [section] if section else []
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
            lines += [sentence, *notes, ""]
        return "\n".join(lines + self.provenance())

    def _repr_html_(self) -> str:
        parts = []
        for section in self._sections():
            table, sentence, notes = self._shown(section)
            head, *body = ([html.escape(cell) for cell in line] for line in table)
            parts.append(f"<p><strong>{html.escape(section)}</strong></p>" if section else "")
            parts.append(f'<div style="overflow-x: auto">{html_table(head, body)}</div>')
            parts.append(f"<p>{html.escape(sentence)}</p>")
            notes = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
            parts.append(f"<ul>{notes}</ul>" if notes else "")
        parts.append(f"<p>{'<br>'.join(map(as_html, self.provenance()))}</p>")
        return "".join(parts)


def _megabytes(case) -> str:
    return f"{case.bytes / 1e6:.3g}" if case.bytes < 999.5e6 else f"{case.bytes / 1e6:,.0f}"


def _cell(value, form=".1f") -> str:
    return "-" if value is None else format(value, form)


def _rate(row: Row) -> str:
    us = float(np.median(row.us))
    if row.provider.startswith("matmul"):
        return f"{row.provider} {MATMUL_FLOPS / us / 1e6:.0f} TFLOP/s"
    return f"{row.provider} {row.bytes / us / 1e3:.0f} GB/s"
