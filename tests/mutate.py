"""Breaks one thing at a time in the modules that decide and count; some test must fail each time.

    python tests/mutate.py                    all modules
    python tests/mutate.py statistics -v      one, naming every mutant

Each mutant runs in a fork, so that torch is loaded once. A survivor is a line that no test holds, or a change that
makes no difference (EQUIVALENT says why). Exit code 1 if there are survivors.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 120  # a mutant that loops is killed, and counts so
TESTS = {
    "rsd_trt.runtime.speculate": ("tests/runtime/test_speculate.py", "tests/runtime/test_policy.py"),
    "rsd_trt.runtime.chunk": ("tests/runtime/test_chunk.py", "tests/runtime/test_policy.py"),
    "rsd_trt.load": ("tests/test_load.py",),
    "rsd_trt.suites": ("tests/eval/libero/test_suites.py",),
    "rsd_trt.runtime.external_data": (
        "tests/runtime/test_ort_session.py::test_external_weights_are_loaded_from_the_bytes_that_were_hashed",
        "tests/runtime/test_ort_session.py::test_weights_outside_are_refused_by_us",
        "tests/runtime/test_ort_session.py::test_files_are_found_wherever_a_tensor_may_stand",
        "tests/runtime/test_ort_session.py::test_what_is_no_graph_is_refused",
    ),
    "rsd_trt.eval.statistics": ("tests/eval/test_statistics.py", "tests/eval/report/test_compare.py"),
}
# By how the mutated line begins: why no test can tell.
EQUIVALENT = {
    "number: RESAMPLES = ": "a precision that was chosen",
    "number: POWER = ": "a power that was chosen; the tests go by it",
    "number: SHORTEST = ": "a length that was chosen; the tests go by it",
    "number: MOST_DEPTH = ": "a depth that was chosen",
    "comparison: if depth > MOST_DEPTH": "a depth that was chosen",
    "number: CHUNK = ": "changes no result",
    "number: LEAST_RESAMPLED = ": "a number that was chosen; the tests go by it",
    "number: SEED = ": "any seed does",
    "comparison: reached += int((np.abs(sums) >= ": "no sum is exactly the slack away",
    "comparison: return bool(np.random.default_rng([STREAM": "no draw is exactly the rate, but 0, once in 2^53",
    "truth: class ": "whether a record can be changed changes no figure",
    "truth: @dataclass(frozen=True)": "whether a record can be changed changes no figure",
    "number: columns = np.asarray([(*a, *b)": "any negative size is inferred",
    "number: columns = np.asarray([row for row": "any negative size is inferred",
    "number: return next((lost for lost in range(1": "one lost episode proves nothing at any alpha",
    'truth: **{f"p{p}"': "there are as many values as percentiles",
}

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "all": "any", "any": "all", "cumprod": "cumsum"}


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that may be broken: what runs, and no annotation or docstring."""
    skip: set[int] = set()
    for node in ast.walk(tree):
        hints: list[ast.AST | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            hints = [node.returns, *(a.annotation for a in (*arguments.args, *arguments.kwonlyargs))]
        elif isinstance(node, ast.AnnAssign):
            hints = [node.annotation]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            hints = [node.value] if isinstance(node.targets[0], ast.Name) and node.col_offset == 0 else []
        skip |= {id(child) for hint in hints if hint is not None for child in ast.walk(hint)}
    yield from (node for node in ast.walk(tree) if id(node) not in skip)


def breaks(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The ways to break a node, each with a word for it."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in COMPARE:
        new.ops[0] = COMPARE[type(new.ops[0])]()
        yield "comparison", new
    elif isinstance(new, ast.BinOp) and type(new.op) in BINARY:
        new.op = BINARY[type(new.op)]()
        yield "operator", new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield "and/or", new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub)):
        yield "sign", new.operand
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield "branches", new
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield "truth", ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, (int, float)):
        yield "number", ast.Constant(new.value + 1)
    elif isinstance(new, ast.Name) and new.id in NAMES:
        new.id = NAMES[new.id]
        yield "name", new
    elif isinstance(new, ast.Attribute) and new.attr in NAMES:
        new.attr = NAMES[new.attr]
        yield "name", new


class Replace(ast.NodeTransformer):
    """Puts `new` in the place of the node at a position of the walk."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, what is broken, the broken module)."""
    count = sum(1 for _ in places(ast.parse(source)))
    for i in range(count):
        kinds = len(list(breaks(list(places(ast.parse(source)))[i])))
        for kind in range(kinds):
            tree = ast.parse(source)
            node = list(places(tree))[i]
            what, new = list(breaks(node))[kind]
            broken = ast.fix_missing_locations(Replace(node, new).visit(tree))
            yield getattr(node, "lineno", 0), what, broken


def survives(name: str, tree: ast.Module | None) -> bool:
    """Whether the tests pass, in a fork, with the module as it is in `tree`."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.alarm(SECONDS)
        code = 1
        try:
            if tree is not None:
                install(name, tree)
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *TESTS[name]]))
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def install(name: str, tree: ast.Module) -> None:
    """Makes `tree` the module of that name, before anything imports it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(tree, spec.origin, "exec"), module.__dict__)
    package, _, last = name.rpartition(".")
    parent: types.ModuleType = importlib.import_module(package)
    setattr(parent, last, module)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="the last part of a module's name")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import numpy
    import pytest
    import torch

    assert numpy and pytest
    torch.set_num_threads(1)
    killed, survivors, equivalent, started = 0, [], 0, time.monotonic()
    for name in TESTS:
        if options.modules and name.rpartition(".")[2] not in options.modules:
            continue
        if not survives(name, None):
            print(f"{name}: its tests fail as it is", file=sys.stderr)
            return 1
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text("utf-8")
        for line, what, tree in mutants(source):
            text = source.splitlines()[line - 1].strip()
            alive = survives(name, tree)
            known = next((why for start, why in EQUIVALENT.items() if f"{what}: {text}".startswith(start)), None)
            killed += not alive
            equivalent += alive and known is not None
            if alive and known is None:
                survivors.append(f"{name}:{line} {what}: {text}")
            if options.verbose or (alive and known is None):
                print(f"{'SURVIVED' if alive else 'killed  '} {name}:{line} {what}: {text}", flush=True)
    print(f"{killed} killed, {len(survivors)} survived, {equivalent} equivalent, {time.monotonic() - started:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
