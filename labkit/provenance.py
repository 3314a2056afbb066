"""Has this code changed since? A hash over the tokens that decide what a kernel computes.

`source_hash` follows a function to every function and module-level constant of ours that it reaches, and hashes their
tokens without comments, blank lines, line breaks inside brackets and docstrings. It reads the source files and imports
nothing: so the value is the same under the interpreter, compiled, without Triton, and on Python 3.11 to 3.13.
"""

import ast
import hashlib
import inspect
import io
import json
import os
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a topic declares for the lab's programs. It decides what is measured, and not what a function computes.
_DECLARATIONS = {"cases", "codegen_cases", "experiments"}
_CHECKS = "labkit.args"  # of its functions, those that return nothing decide whether there is a result, and never which
_DROPPED = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_LAYOUT = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}
# Python 3.12 splits f- and t-strings into parts; 3.11 has no such tokens, hence the -1.
_STRING_START = {getattr(tokenize, f"{kind}STRING_START", -1) for kind in "FT"}
_STRING_END = {getattr(tokenize, f"{kind}STRING_END", -1) for kind in "FT"}


def with_root() -> str:
    """PYTHONPATH for a process of ours: the lab before whatever stands there already."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def source_hash(*roots, extra=None):
    """Return 16 hex digits over the roots and everything of ours that they reach.

    roots: functions (plain, jit-compiled or interpreted) or names such as "kernels.fusion:swiglu", found at the top
        level of their file.
    extra: whatever else decides the result, e.g. constexprs and launch options; anything json can write.

    A function that moves to another file unchanged keeps the hash. Raises ValueError for a root that is not found.
    """
    tokens = sorted(_tokens(text, node) for text, node in _reach(roots).values())
    payload = json.dumps([tokens, extra], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


class _Module:
    """The top-level definitions and imports of one source file, read without importing it."""

    def __init__(self, name, file):
        self.name = name
        self.text = file.read_text(encoding="utf-8")
        # the folder that holds the top-level package
        depth = name.count(".") + (file.name == "__init__.py")
        self.package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self.folder = file.parents[depth]
        self.defined, self.imported = {}, {}
        self._collect(ast.parse(self.text).body)

    def _collect(self, body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.defined.setdefault(node.name, []).append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                for target in getattr(node, "targets", None) or [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.defined.setdefault(name.id, []).append(node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (alias.name, None)
            elif isinstance(node, ast.ImportFrom):
                parents = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
                source = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (source, alias.name)
            else:
                # both branches of `if` and `try` count: which one runs may depend on the machine
                for field in ("body", "orelse", "finalbody"):
                    self._collect(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    self._collect(handler.body)


def _reach(roots):
    """Return {"module:name": (file text, node)} of the roots and all they reach; a second definition gets a suffix."""
    modules, found = {}, {}

    def load(name, folder):
        if name not in modules:
            stem = folder.joinpath(*name.split("."))
            file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
            modules[name] = file and _Module(name, file)
        return modules[name]

    def visit(module, dotted):
        """Follow a dotted name, e.g. `_tile.dot`, as it stands in `module`; return whether it is ours."""
        name, _, rest = dotted.partition(".")
        if name in module.defined:
            if module.name == _CHECKS and all(_returns_nothing(node) for node in module.defined[name]):
                return True
            if f"{module.name}:{name}" not in found:
                for i, node in enumerate(module.defined[name]):
                    found[f"{module.name}:{name}" + "'" * i] = (module.text, node)
                    for used in _used_names(node):
                        visit(module, used)
            return True
        # `import a.b` binds a, and is used as a.b.c; `import a.b as c` and `from a import b` bind the last name
        bound = next((key for key in module.imported if dotted == key or dotted.startswith(key + ".")), None)
        if bound is None:
            return False
        source, member = module.imported[bound]
        rest = dotted[len(bound) + 1 :]
        target = load(source, module.folder)
        if member and not (target and (member in target.defined or member in target.imported)):
            # `from package import module`
            target, member = load(f"{source}.{member}", module.folder), None
        inner = ".".join(filter(None, [member, rest]))
        if target and not inner:  # the module itself is handed on: whatever it defines may be called
            for name in set(target.defined) - _DECLARATIONS:
                visit(target, name)
            return True
        return bool(target and visit(target, inner))

    for root in roots:
        if isinstance(root, str):
            module_name, _, name = root.partition(":")
            module = load(module_name, ROOT)
        else:
            while not inspect.isfunction(root) and hasattr(root, "fn"):
                root = root.fn
            if not inspect.isfunction(root) or "<locals>" in root.__qualname__:
                raise ValueError(f"root must be a function at the top level of a file, got {root!r}")
            module_name, name = root.__module__, root.__qualname__
            if module_name not in modules:
                modules[module_name] = _Module(module_name, Path(inspect.getsourcefile(root)))
            module = modules[module_name]
        if module is None or not visit(module, name):
            raise ValueError(
                f"root {module_name}:{name} is not defined at the top level of a file of the lab"
            )
    return found


def _returns_nothing(node):
    return isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) in ("None", "NoReturn")


def _used_names(node):
    """Return the dotted names that `node` reads, except its own arguments and local variables."""
    local = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    if isinstance(node, ast.FunctionDef):
        local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bases = {id(n.value) for n in ast.walk(node) if isinstance(n, ast.Attribute)}  # the a of a.b is not used itself
    names = set()
    for n in ast.walk(node):
        if isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Load) and id(n) not in bases:
            dotted = ast.unparse(n)
            if all(part.isidentifier() for part in dotted.split(".")) and dotted.split(".")[0] not in local:
                names.add(dotted)
    return sorted(names)


def _tokens(text, node):
    """Return the tokens of one definition, decorators included, as one string."""
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    source = "".join(lines[first - 1 : node.end_lineno])
    docstrings = {
        (n.body[0].lineno - first + 1, n.body[0].col_offset)
        for n in ast.walk(node)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n) is not None
    }
    out, nested, start = [], 0, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _STRING_START:
            start = start if nested else token.start
            nested += 1
        elif token.type in _STRING_END:
            nested -= 1
            if not nested:
                out.append(_slice(source, start, token.end))
        elif nested or token.type in _DROPPED:
            continue
        elif token.type == tokenize.STRING and token.start in docstrings:
            # the line end that follows a docstring goes too
            out.append(None)
        elif token.type == tokenize.NEWLINE and out and out[-1] is None:
            out.pop()
        else:
            out.append(_LAYOUT.get(token.type, token.string))
    return " ".join(out)


def _slice(source, start, end):
    lines = source.splitlines(keepends=True)[start[0] - 1 : end[0]]
    lines[-1] = lines[-1][: end[1]]
    lines[0] = lines[0][start[1] :]
    return "".join(lines)
