"""What runs where: one call of every public kernel, compiled for eight GPUs; run in the interpreter, and as PTX.

`python -m kernels codegen --table` writes `results/compiled.json`; the page "What runs where" shows it, and says which
kernels have changed since. The call is the first case that a topic declares of the function.
The gate of the tests is stricter: it compiles every case for the four targets of `codegen.TARGETS`.
"""

import html
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit import codegen
from labkit.provenance import source_hash, with_root
from labkit.record import RESULTS, toolchain
from labkit.show import cards, html_table

FILE = RESULTS / "compiled.json"
EMULATED = "sm_90"  # whose PTX runs on the CPU
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def run_script(script: str, how: str) -> str:
    """Run a Python script on the CPU; return what it printed, or the last line of its error.

    how: "interpreter", or "ptx": its kernels are compiled for `EMULATED` and their PTX is run.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LAB_PTX")}
    env |= {"PYTHONPATH": with_root()} | ({"LAB_PTX": EMULATED} if how == "ptx" else {"TRITON_INTERPRET": "1"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")  # Triton reads a kernel's source from its file
        path.write_text(script, encoding="utf-8")
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return done.stdout.strip()
    return (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]


def representatives(topics):
    """{function: case}: the first case of each function that the topics declare."""
    found = {}
    for topic in topics:
        for case in codegen.cases(topic):
            found.setdefault(case.function, case)
    return found


def compile_table(cases, run, targets=TARGETS):
    """Compile the cases, {function: case}; return what `save` writes.

    run: {"interpreter" or "ptx": {function: verdict of a run, "ok: ..." or "wrong: ..."}}; others are in the tests.
    """
    rows, found = [], {}  # (function, target) -> one dict a kernel
    for kernel in codegen.compiled(list(cases.values()), targets):
        found.setdefault((kernel["function"], kernel["target"]), []).append(kernel)
    for function, case in cases.items():
        row = {"function": function, "case": case.name}
        row |= {how: run.get(how, {}).get(function, "") for how in ("interpreter", "ptx")}
        row |= {"source_hash": source_hash(function), "targets": {}}
        for target in targets:
            made = found[function, target]
            problems = [problem for kernel in made for problem in codegen.problems(case, kernel)]
            row["targets"][target] = {
                "problems": list(dict.fromkeys(problems)),
                "spills": sum(kernel.get("spills", 0) for kernel in made),
                "shared": max(kernel.get("shared", 0) for kernel in made),
                "matrix": sorted({name for kernel in made for name in kernel.get("matrix", {})}),
                "compiles": all("error" not in kernel for kernel in made),
            }
        rows.append(row)
    return toolchain() | {"targets": list(targets), "rows": rows}


def save(table, path=FILE):
    """Write what `compile_table` returned."""
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def load(path=FILE):
    """What `save` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def changed(table):
    """The functions whose code is not the one that was compiled, or is gone."""

    def now(function):
        try:
            return source_hash(function)
        except ValueError:
            return None

    return [row["function"] for row in table["rows"] if now(row["function"]) != row["source_hash"]]


def cell(result):
    """One target's result: (verdict, shared memory and matrix instruction)."""
    if not result["compiles"]:
        return "does not compile", ""
    verdict = [f"{result['spills']} spills"] if result["spills"] else []
    verdict += ["no MMA"] if any("matrix instruction" in problem for problem in result["problems"]) else []
    verdict = ", ".join(verdict) or ("see below" if result["problems"] else "ok")
    shared, unit = result["shared"], {name.split(".")[0].removeprefix("v_").split("_")[0] for name in result["matrix"]}
    size = f"{shared / 1024:.3g} KiB" if shared >= 1024 else f"{shared} B"
    return verdict, " ".join([size, *sorted(unit)])


class Table:
    """The table as the page shows it. `notes` has every complaint, in the compiler's or the gate's words."""

    def __init__(self, table):
        self.table = table
        self.devices = {target: codegen.ALL_TARGETS[target].device for target in table["targets"]}

    def made(self):
        """When, and with what."""
        return "Compiled {date} UTC, commit {commit}, with Triton {triton}, torch {torch}.".format(**self.table)

    def lines(self):
        """Rows of pairs: what stands above, and what stands below it. A kernel file is the heading of its functions."""
        lines = [[("kernel", "case"), ("interpreter", "on the CPU"), ("PTX", "on the CPU"), *self.devices.items()]]
        heading = None
        for row in self.table["rows"]:
            run = [(row[how].partition(":")[0] or "in the tests", "") for how in ("interpreter", "ptx")]
            cells = [cell(row["targets"][target]) for target in self.table["targets"]]
            file, name = row["function"].removeprefix("kernels.").split(":")
            lines += [[(file, "")]] * (file != heading) + [[(name, row["case"]), *run, *cells]]
            heading = file
        return lines

    def notes(self):
        """The complaints, as a table: kernel, targets, in what words. Targets of the same words share a line."""
        found = {}
        for row in self.table["rows"]:
            for target, result in row["targets"].items():
                if result["problems"]:
                    function = row["function"].removeprefix("kernels.").replace(":", ": ")
                    found.setdefault((function, "; ".join(result["problems"])), []).append(target)
        body = [
            [html.escape(function), ", ".join(f"{t} {self.devices[t]}" for t in targets), html.escape(problems)]
            for (function, problems), targets in found.items()
        ]
        return cards(("kernel", "compiled for", "complaints"), body, widths=(30, 20, 50))

    def __repr__(self):
        lines = [[", ".join(filter(None, pair)) for pair in line] for line in self.lines()]
        widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) > 1))]
        return "\n".join(["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines] + [self.made()])

    def _repr_html_(self):
        def pair(above, below):
            mark = above if above in ("ok", "in the tests", *self.devices) else f"<b>{html.escape(above)}</b>"
            return f"{mark}<br><small>{html.escape(below)}</small>" if below else mark

        head, *body = ([pair(*texts) for texts in line] for line in self.lines())
        made = f"<p><small>{html.escape(self.made())}</small></p>"
        return f'<div class="lab-runs"><style>{_STYLE}</style>{html_table(head, body)}</div>{made}'


_STYLE = """
.bd-content .cell_output .lab-runs.lab-runs table { white-space: normal; }
.lab-runs :is(td, th) { vertical-align: top; text-align: left; } .lab-runs tbody th { min-width: 8rem; }
.bd-content .cell_output .lab-runs.lab-runs :is(td, th) { padding: .15rem .25rem; }
.lab-runs thead th:nth-child(-n + 3) { white-space: nowrap; }
.lab-runs td b { display: inline-block; min-width: 4.4rem; }
.lab-runs small { font-size: .88em; font-weight: normal; } .lab-runs tr { border-bottom: 1px solid #8885; }
.lab-runs .lab-group th { padding-top: .5rem !important; font-size: 1.1em; }
"""
