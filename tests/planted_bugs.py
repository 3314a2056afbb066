"""Shows that the tests can fail: plants one bug at a time in a copy of the repository and runs the topic's tests.

    python tests/planted_bugs.py [topic ...]

Every tests/test_<topic>.py lists its own: PLANTED_BUGS = [(file, old text, new text), ...]. The old text stands in
the file exactly once, so a bug that no longer applies is noticed. A bug is caught when a test fails (or the process
dies, as unmasked loads make it); one that survives makes this program exit with 1. Before the first bug of a topic
its tests have to pass in the copy as it is, or a failure would show nothing.
"""

import ast
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def planted_bugs(test_file: Path) -> list[tuple[str, str, str]]:
    """The table of a test file, read without importing it."""
    for node in ast.parse(test_file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PLANTED_BUGS":
            return ast.literal_eval(node.value)
    return []


def fails(test_file: Path, bug: tuple[str, str, str] | None = None) -> bool:
    """Whether a test fails in a copy of the repository, with the bug planted."""
    with tempfile.TemporaryDirectory() as tmp:
        for room in ("kernels", "labkit", "tests", "chapters"):
            shutil.copytree(ROOT / room, Path(tmp) / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy(file, tmp)
        if bug:
            file, old, new = bug
            path = Path(tmp) / file
            source = path.read_text()
            if (count := source.count(old)) != 1:
                raise SystemExit(f"{test_file.name}: the text to change stands {count} times in {file}: {old!r}")
            path.write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--rootdir", tmp, f"tests/{test_file.name}"]
        done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
        if done.returncode in (2, 3, 4, 5):  # not a failed test but an error in collecting or starting
            raise SystemExit(f"{test_file.name}: pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode != 0


def main(topics: list[str]) -> int:
    survivors, tables = 0, {path: planted_bugs(path) for path in sorted((ROOT / "tests").glob("test_*.py"))}
    tables = {path.stem.removeprefix("test_"): (path, bugs) for path, bugs in tables.items() if bugs}
    if unknown := set(topics) - set(tables):
        raise SystemExit(f"{', '.join(unknown)}: no PLANTED_BUGS; there are some of {', '.join(tables)}")
    for test_file, bugs in (tables[topic] for topic in topics or tables):
        if fails(test_file):
            raise SystemExit(f"{test_file.name} fails as it is: mend that first")
        for file, old, new in bugs:
            caught = fails(test_file, (file, old, new))
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'}  {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
    print(f"{survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
