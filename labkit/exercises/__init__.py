"""Exercises that are checked in place, and whose checks are themselves checked.

An exercise is its solution: a function in `labkit/exercises/<topic>.py` between whose markers the reader writes.

    @exercise(hints=["..."], bugs=[("lse_a + lse_b", "lse_a", "forgets a half"), ...])
    def merge_two(o_a, lse_a, o_b, lse_b):
        '''The docstring is the task.'''
        # >>> your code
        ...the solution...
        # <<< your code
        return o, lse

    @merge_two.case("an empty half changes nothing")
    def _(fn):
        expect(fn(...), ..., "o")

    merge_two.check(fn)   in the notebook: runs the cases on the reader's function, prints what passes and a hint
    merge_two.stub        the source with the marked part taken out
    merge_two.cell        the notebook's cell: the stub and its check
    merge_two.solution    the whole source, for the fold

Each bug is an edit of the solution's text. tests/test_exercises.py proves that the stub fails politely, the solution
passes, and every bug is caught, and that the notebook's cell is the stub.

`kernel_exercise` is the same for a Triton kernel. Its cases launch it: fn[grid](...). They run it as kernels run here,
and then once more as compiled code, which shows what the interpreter can't: reads out of bounds, and races. A bug that
only compiled code shows has the word "compiled" in its third text; it is left out where none can be run. A write out of
bounds is found by both: the tensors of a kernel lie between fences.
"""

import importlib
import inspect
import json
import linecache
import math
import textwrap
import traceback

from labkit import ptx, trace
from labkit.show import Source

START, STOP = "# >>> your code", "# <<< your code"


class Exercise:
    """See the module's docstring. hints: sentences, from vague to plain; bugs: (old, new, what is wrong)."""

    runs_compiled = False  # whether a check runs compiled code too, on the CPU

    def __init__(self, fn, hints, bugs):
        lines = textwrap.dedent(inspect.getsource(fn)).splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("def "))  # the decorator may take many lines
        self.name, self.fn, self.hints, self.bugs, self.cases = fn.__name__, fn, list(hints), list(bugs), {}
        self.source = "\n".join(lines[first:])
        if self.source.count(START) != 1 or self.source.count(STOP) != 1:
            raise ValueError(f"exercise {self.name}: expected one line `{START}` and one `{STOP}`")

    def case(self, title):
        """Decorator: a function of the reader's function that raises AssertionError when it is wrong."""

        def add(run):
            if title in self.cases:
                raise ValueError(f"exercise {self.name}: two cases are called {title!r}")
            self.cases[title] = run
            return run

        return add

    @property
    def stub(self):
        """The source with the marked part replaced by `raise NotImplementedError`."""
        before, rest = self.source.split(START)
        after = rest.split(STOP)[1]
        indent = before[before.rfind("\n") + 1 :]
        return f"{before}{START}\n{indent}raise NotImplementedError\n{indent}{STOP}{after}"

    @property
    def cell(self):
        """The notebook's cell: the stub, and the call that checks it."""
        return f"{self.stub}\n\n\nexercises.{self.name}.check({self.name})"

    @property
    def solution(self):
        """The whole source, without the markers; renders as code."""
        lines = [line for line in self.source.splitlines() if line.strip() not in (START, STOP)]
        return Source("\n".join(lines), f"`labkit/exercises/{self.fn.__module__.rsplit('.', 1)[-1]}.py`")

    def failures(self, fn):
        """{case: message} of the cases that fail; empty when all pass."""
        found = {}
        for title, run in self.cases.items():
            called = [""]
            try:
                run(self._watched(fn, called))
            except NotImplementedError:
                found[title] = "not written yet"
            except AssertionError as error:
                found[title] = (str(error) or "wrong") + called[-1]
            except Exception as error:  # whatever the reader's code raises belongs into the report
                found[title] = _raised(error, fn) + called[-1]
        return found

    def _watched(self, fn, called):
        """fn, which notes in the list `called` with what it is called, if that is short."""

        def watched(*args):
            values = ", ".join(repr(x) for x in args if not callable(x))
            called.append(f"; called with {values}" if _is_short(values) else "")
            return fn(*args)

        return watched

    def check(self, fn):
        """Run the cases on the reader's `fn` and print the outcome."""
        found = self.failures(fn)
        if found and all(message == "not written yet" for message in found.values()):
            waiting = "1 case is" if len(self.cases) == 1 else f"{len(self.cases)} cases are"
            print(f"{self.name}: not written yet. {waiting} waiting.")
        elif not found:
            print(f"{self.name}: {'its case passes' if len(self.cases) == 1 else f'all {len(self.cases)} cases pass'}.")
            return
        else:
            for title in self.cases:
                print(f"FAIL  {title}: {found[title]}" if title in found else f"pass  {title}")
        for number, hint in enumerate(self.hints[:1] if len(found) == len(self.cases) else self.hints, 1):
            print(textwrap.fill(f"Hint {number}: {hint}", 88, subsequent_indent=8 * " "))

    def edited(self, old, new):
        """The solution's function after one edit of its text, to prove that the cases catch it."""
        if self.source.count(old) != 1:
            raise ValueError(f"exercise {self.name}: {old!r} occurs {self.source.count(old)} times, expected once")
        return self.compiled(self.source.replace(old, new))

    def compiled(self, source):
        """The function that `source` defines, in the namespace of the solution's module."""
        namespace = dict(vars(inspect.getmodule(self.fn)))
        exec(compile(source, f"<{self.name}>", "exec"), namespace)
        return namespace[self.name]


def _is_short(text) -> bool:
    """Whether a message has room for it."""
    return len(text) < 100 and "\n" not in text


def _raised(error, fn) -> str:
    """An exception in words, with the line of the reader's code that it came from."""
    while type(error).__name__ == "InterpreterError" and error.__cause__:  # Triton's interpreter wraps the real one
        error = error.__cause__
    code = getattr(getattr(fn, "fn", fn), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if code and frame.filename == code.co_filename and frame.line]
    return f"{type(error).__name__}: {error}" + (f", in the line `{lines[-1]}`" if lines else "")


class _Fenced:
    """A kernel whose tensors lie between fences, where a stray write can be seen and does no harm.

    In the interpreter it would spoil the memory of this very process.
    """

    SIZE = 1 << 16  # bytes on either side

    def __init__(self, kernel):
        self.kernel, self.fn = kernel, getattr(kernel, "fn", kernel)

    def __getitem__(self, grid):
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(self, grid, args, options):
        arguments = dict(zip(inspect.signature(self.fn).parameters, args, strict=False)) | options
        tensors = {name: x for name, x in arguments.items() if hasattr(x, "as_strided") and x.numel()}
        fences = {name: _Fence(x, number) for number, (name, x) in enumerate(tensors.items())}
        self.kernel[grid](**arguments | {name: fence.inside for name, fence in fences.items()})
        for name, fence in fences.items():
            stray = fence.taken_down()
            assert not stray, f"numbers outside of {name.removesuffix('_ptr')} were written: {stray}"


class _Fence:
    """`inside`: the tensor x again, in a larger piece of memory; `number` makes what stands around it its own."""

    def __init__(self, x, number):
        import torch

        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        nan = torch.tensor([math.nan], dtype=x.dtype).view(bits).item() + 1 if x.is_floating_point() else -99
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        posts = torch.full((_Fenced.SIZE // x.element_size(),), nan + number, dtype=bits, device=x.device)
        self.own, self.posts = x.as_strided((size,), (1,)), posts
        self.room = torch.cat([posts, self.own.view(bits), posts])
        self.inside = self.room.view(x.dtype).as_strided(x.shape, x.stride(), len(posts))

    def taken_down(self) -> int:
        """Copies what was written into x back; returns how many numbers were written around it."""
        first, last = len(self.posts), len(self.posts) + len(self.own)
        self.own.copy_(self.room[first:last].view(self.own.dtype))
        return int((self.room[:first] != self.posts).sum() + (self.room[last:] != self.posts).sum())


class KernelExercise(Exercise):
    """An exercise whose solution is a Triton kernel.

    It stands in its file without `@triton.jit`, and with "tl.constexpr" in quotes, so that the file needs no Triton.
    """

    def __init__(self, fn, hints, bugs):
        super().__init__(fn, hints, bugs)
        self.source = "@triton.jit\n" + self.source.replace('"tl.constexpr"', "tl.constexpr")
        self._known = {}  # text of a kernel -> what its compiled run found; that takes seconds

    @property
    def runs_compiled(self):
        return trace.interpreted() and ptx.compiler() is not None

    def failures(self, fn):
        """As `Exercise.failures`; what passes here is compiled for an H200, and that code is run on the CPU."""
        text = textwrap.dedent(inspect.getsource(getattr(fn, "fn", fn)))
        if "raise NotImplementedError" in text:
            return dict.fromkeys(self.cases, "not written yet")
        importlib.import_module("kernels._tile")  # in its interpreter what a mask leaves out is undefined
        found = super().failures(fn)
        if not found and self.runs_compiled:
            if text not in self._known:
                self._known[text] = self._compiled_failures(text)
            found = {title: f"compiled for an H200: {why}" for title, why in self._known[text].items()}
        return found

    def _compiled_failures(self, text):
        from labkit.what_runs import run_script

        script = f"import kernels\nimport json, torch, triton, triton.language as tl\n\n{text}\n\n"
        script += f"from {self.fn.__module__} import {self.name} as exercise\n"
        script += f"print(json.dumps(exercise.failures({self.name})))"
        printed = run_script(script, "ptx")
        unknown = ("ValueError: PTX, line", "ValueError: an instruction that is not known")  # no fault of the reader's
        try:
            found = json.loads(printed.splitlines()[-1])
            return {title: why for title, why in found.items() if not why.startswith(unknown)}
        except (ValueError, IndexError):  # not even the launch: the last line of the error
            return dict.fromkeys(self.cases, printed)

    def _watched(self, fn, called):
        return _Fenced(fn)

    def compiled(self, source):
        """The kernel that `source` defines. Triton reads a kernel's text: the module linecache lends it a file."""
        import triton
        import triton.language as tl

        file = f"<{self.name} {hash(source):x}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        namespace = {**vars(inspect.getmodule(self.fn)), "triton": triton, "tl": tl}
        exec(compile(source, file, "exec"), namespace)
        return namespace[self.name]


def device() -> str:
    """Where the tensors of a kernel's case have to live: "cuda" where kernels run on a GPU, else "cpu"."""
    return importlib.import_module("kernels").DEVICE


def exercise(*, hints, bugs):
    """Decorator that turns a solution into an `Exercise`."""
    return lambda fn: Exercise(fn, hints, bugs)


def kernel_exercise(*, hints, bugs):
    """Decorator that turns the body of a Triton kernel into a `KernelExercise`."""
    return lambda fn: KernelExercise(fn, hints, bugs)


def expect(got, want, what="result", *, atol=1e-5, rtol=1e-5):
    """Raise AssertionError, in words for a reader, unless `got` equals `want`: numbers and tensors within the tolerance
    (NaN differs from everything), everything else exactly."""
    if hasattr(want, "shape"):
        import torch

        want = torch.as_tensor(want)
        assert hasattr(got, "shape"), f"{what}: got {type(got).__name__}, expected a tensor"
        got = torch.as_tensor(got)
        assert got.shape == want.shape, f"{what}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        near = torch.isclose(got.double(), want.double(), atol=atol, rtol=rtol)
        if not near.all():
            where = tuple((~near).nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int((~near).sum())} of {near.numel()} values differ; at {list(where)} got "
                f"{got[where].item():.6g}, expected {want[where].item():.6g}"
            )
    elif isinstance(want, (tuple, list)):
        assert isinstance(got, (tuple, list)), f"{what}: got {type(got).__name__}, expected {len(want)} values"
        values = f": {got} instead of {want}"
        values = values if _is_short(values) else ""
        assert len(got) == len(want), f"{what}: got {len(got)} values, expected {len(want)}{values}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            expect(a, b, f"{what}[{i}]", atol=atol, rtol=rtol)
    elif isinstance(want, float):
        try:
            near = math.isclose(float(got), want, rel_tol=rtol, abs_tol=atol)
        except (TypeError, ValueError):
            near = False
        assert near, f"{what}: got {got}, expected {want:.6g}"
    else:
        assert got == want, f"{what}: got {got!r}, expected {want!r}"
