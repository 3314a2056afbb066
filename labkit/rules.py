"""Block rules, changed for a trial: what a kernel does with another tile size, other warps or stages.

A block rule is a small function of a kernel's file that returns a dict of tile sizes and launch options, such as
`kernels.flash_decoding:split_config`. Nothing here imports the kernels: rules are named.
"""

import contextlib
import importlib


@contextlib.contextmanager
def changed(rules):
    """Inside, the named rules return what they choose, with these values put in its place.

    rules: {"kernels.flash_decoding:split_config": {"BLOCK_N": 128}}. A launch looks its rule up in its own file, so a
    rule that a file imported is named there. Raises ValueError for a rule that is not there, or a value that the rule
    does not choose; nothing is changed then, nor after.
    """
    with contextlib.ExitStack() as undo:
        for name, values in rules.items():
            file, _, function = name.partition(":")
            module = importlib.import_module(file)
            rule = getattr(module, function, None)
            if rule is None:
                raise ValueError(f"rules: got {name!r}, expected a function of {file}")
            undo.callback(setattr, module, function, rule)
            setattr(module, function, _with(rule, name, values))
        yield


def _with(rule, name, values):
    def choose(*args, **kwargs):
        chosen = rule(*args, **kwargs)
        if unknown := set(values) - set(chosen):
            raise ValueError(f"rules: got {sorted(unknown)} for {name}, which chooses {sorted(chosen)}")
        return chosen | values

    return choose
