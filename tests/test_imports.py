"""The import rule, and what imports must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

import rsd_trt

PACKAGE = Path(rsd_trt.__file__).parent
# A module imports from its own line and the lines above it. Stages of one line do not import each other.
LAYERS = (
    {"__init__", "errors", "config", "files", "isolated", "records", "host", "load", "suites"},
    {"models"},
    {"prompts", "weights"},
    {"bundle", "trt", "manifest", "recordings", "recorder"},
    {"presets"},
    {"importers", "export", "runtime"},
    {"eval"},
    {"training"},
    {"cli"},
    {"__main__"},
)
APART = {"export", "runtime"}
# The same within eval: the modules that its folders share come first. A report is made of everything.
EVAL_LAYERS = ("eval", "libero", "verify", "profile", "report", "sweep")
EVAL_APART = {"libero", "profile"}
NEVER_AT_THE_TOP = {"tensorrt", "tensorrt_lean", "tensorrt_rtx", "onnx", "onnxruntime"}
NEVER_AT_THE_TOP |= {"libero", "timm", "transformers", "ray"}
WITHOUT_TORCH = {"__init__", "bundle", "cli", "config", "errors", "files", "trt", "host"}
WITHOUT_TORCH |= {"isolated", "load", "records", "recordings", "recorder"}
WITHOUT_TORCH |= {"manifest", "presets", "prompts", "suites", "weights"}


def python_files() -> Iterator[Path]:
    """Every module, through the links to the stages' folders too."""
    folders = [PACKAGE]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir():
                folders.append(path)
            elif path.suffix == ".py":
                yield path


def part_of(path: Path) -> str:
    """The module or folder right below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def folder_of_eval(names: Sequence[str]) -> str:
    """The folder of eval that the parts of a name lead to; `eval` for what lies in none."""
    return names[1] if names[0] == "eval" and len(names) > 1 and names[1] in EVAL_LAYERS else "eval"


MODULES = [pytest.param(path, id=path.relative_to(PACKAGE).as_posix()) for path in python_files()]


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The dotted names that import statements name; `from a import b` names `a.b`."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, nothing for type checkers only."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from run_at_import(node.orelse)
            continue
        yield node
        yield from run_at_import([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
        if isinstance(node, ast.Try):
            yield from run_at_import([statement for handler in node.handlers for statement in handler.body])


@pytest.mark.parametrize("path", MODULES)
def test_the_import_rule(path: Path) -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    part = part_of(path)
    if path.name == "__init__.py" and path.parent == PACKAGE:  # names its exports for type checkers
        assert not {n for n in imported(run_at_import(ast.parse(path.read_text("utf-8")).body)) if "rsd_trt" in n}
        return
    assert part in level, f"put {part} into LAYERS"
    for name in imported(ast.walk(ast.parse(path.read_text("utf-8")))):
        package, _, rest = name.partition(".")
        if package != "rsd_trt":
            continue
        target = rest.partition(".")[0]
        target = target if target in level else "__init__"  # a name of the package itself, such as its version
        assert level[target] <= level[part], f"{part} imports {target}"
        assert part == target or not {part, target} <= APART, f"{part} imports {target}"


@pytest.mark.parametrize("path", [case for case in MODULES if str(case.id).startswith("eval/")])
def test_the_import_rule_of_eval(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    folder = folder_of_eval(parts)
    assert len(parts) == 2 or folder != "eval", f"put {parts[1]} into EVAL_LAYERS"
    for name in imported(ast.walk(ast.parse(path.read_text("utf-8")))):
        package, *rest = name.split(".")
        if package != "rsd_trt" or rest[0] != "eval":
            continue
        target = folder_of_eval(rest)
        assert EVAL_LAYERS.index(target) <= EVAL_LAYERS.index(folder), f"{folder} imports {target}"
        assert folder == target or not {folder, target} <= EVAL_APART, f"{folder} imports {target}"


@pytest.mark.parametrize("path", MODULES)
def test_optional_packages_are_imported_where_they_are_needed(path: Path) -> None:
    banned = NEVER_AT_THE_TOP | ({"torch"} if part_of(path) in WITHOUT_TORCH else set())
    names = imported(run_at_import(ast.parse(path.read_text("utf-8")).body))
    assert not banned & {name.partition(".")[0] for name in names}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_everything_has_no_side_effect() -> None:
    names = [".".join(("rsd_trt", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in python_files()]
    names = [name.removesuffix(".__init__") for name in names]
    if find_spec("triton") is None:  # PyTorch brings it along for CUDA alone
        names.remove("rsd_trt.models.fast.kernels")
    code = (
        "import importlib, logging, os\n"
        "environment = dict(os.environ)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert dict(os.environ) == environment, 'the environment changed'\n"
        "assert not logging.getLogger().handlers, 'logging was set up'\n"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_package_itself_imports_nothing_before_it_is_used() -> None:
    code = (
        "import sys, rsd_trt\n"
        "assert not {'torch', 'numpy', 'rsd_trt.config'} & set(sys.modules)\n"
        "assert set(rsd_trt.__all__) <= set(dir(rsd_trt))\n"
        "for name in rsd_trt.__all__: getattr(rsd_trt, name)\n"
        "from rsd_trt import bundle, config, presets\n"
        "for part in config.PARTS: bundle.outline(presets.preset('tiny', 'x'), part)\n"
        "assert 'torch._dynamo' not in sys.modules, 'a bundle is opened a second later'\n"
        "try: rsd_trt.Polcy\n"
        "except AttributeError as error: print(error)\n"
    )
    assert python(code).stdout == "module 'rsd_trt' has no attribute 'Polcy'\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["init", "--help"], ["eval", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from rsd_trt.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
    )
    assert python(code).stdout
