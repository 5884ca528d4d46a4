"""Whether a TensorRT's bindings have every name that the project uses, and signatures that fit its calls.

    python tests/runtime/bindings.py MODULE TARGET

A process of its own imports one TensorRT, since several do not go into one. It prints a line of JSON.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import rsd_trt

PACKAGE = Path(rsd_trt.__file__).parent
RUN = ("trt.py", "runtime/trt_session.py")
FILES = {"tensorrt": (*RUN, "export/to_engine.py"), "rtx": (*RUN, "export/to_engine.py"), "lean": RUN}
# Functions that are for other distributions alone.
OTHERS = {"tensorrt": {"_set_capabilities"}, "rtx": {"_set_compatibility"}, "lean": set[str]()}

# The class behind each variable of the files.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "entry": "ITensor",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "serialised": "IHostMemory",
    "runtime": "Runtime",
    "loaded": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "self.runtime": "Runtime",
    "self.engine": "ICudaEngine",
}
RESULTS = {"get_timing_cache": "ITimingCache"}  # of calls that are used without a name
# What a class's method cannot be called without.
REQUIRED = {
    ("Runtime", "deserialize_cuda_engine"): ["serialized_engine"],
    ("ICudaEngine", "create_execution_context"): [],
    ("ICudaEngine", "get_tensor_name"): ["index"],
    ("IExecutionContext", "set_input_shape"): ["name", "shape"],
    ("IExecutionContext", "set_tensor_address"): ["name", "memory"],
    ("IExecutionContext", "execute_async_v3"): ["stream_handle"],
}


class Bindings:
    """An imported TensorRT, as the project's code sees it."""

    def __init__(self, module: str, target: str) -> None:
        self.trt, self.target = importlib.import_module(module), target

    def nodes(self) -> Iterator[ast.AST]:
        """The code that runs with this distribution."""
        for name in FILES[self.target]:
            for statement in ast.parse((PACKAGE / name).read_text("utf-8")).body:
                if getattr(statement, "name", None) not in OTHERS[self.target]:
                    yield from ast.walk(statement)

    def owner(self, node: ast.expr) -> object | None:
        """The class, enum or module that an expression is, if it is one of TensorRT's."""
        name = ast.unparse(node)
        if name == "trt":
            return self.trt
        if name in CLASSES:
            return getattr(self.trt, CLASSES[name])
        if isinstance(node, ast.Call) and self.ours(node.func):
            return getattr(self.trt, RESULTS[node.func.attr])
        if isinstance(node, ast.Attribute) and (parent := self.owner(node.value)) is not None:
            return getattr(parent, node.attr, None)
        return None

    def ours(self, node: ast.AST) -> bool:
        """Whether a node takes an attribute from something of TensorRT's."""
        return isinstance(node, ast.Attribute) and self.owner(node.value) is not None

    def names(self) -> list[ast.Attribute]:
        """Every name of TensorRT's that is used."""
        return [node for node in self.nodes() if isinstance(node, ast.Attribute) and self.ours(node)]

    def calls(self) -> list[ast.Call]:
        """Every call of something of TensorRT's."""
        return [node for node in self.nodes() if isinstance(node, ast.Call) and self.ours(node.func)]

    def problems(self) -> Iterator[str]:
        """What does not fit, a sentence each."""
        for node in self.names():
            if not hasattr(self.owner(node.value), node.attr):
                yield f"there is no {ast.unparse(node)}"
        for call in self.calls():
            assert isinstance(call.func, ast.Attribute)
            known = overloads(getattr(self.owner(call.func.value), call.func.attr))
            if not any(isinstance(argument, ast.Starred) for argument in call.args) and not fits(call, known):
                yield f"{ast.unparse(call)} fits none of {known}"
        for node in self.nodes():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and self.ours(node.value.func):
                (target,) = node.targets
                if ast.unparse(target) not in CLASSES:
                    yield f"{ast.unparse(node)}: add the variable to CLASSES"
        for (owner, name), wanted in REQUIRED.items():
            found = [
                [p for p, required in one if required] for one in overloads(getattr(getattr(self.trt, owner), name))
            ]
            if wanted not in found:
                yield f"{owner}.{name} requires {found}, not {wanted}"


def overloads(function: object) -> list[list[tuple[str, bool]]]:
    """Parameters (name, required) of each signature in a binding's docstring, without `self`."""
    documented = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    found = []
    for text in re.findall(r"^(?:\d+\. )?\w+\(self: .*\) -> .+$", str(documented.__doc__), re.MULTILINE):
        inside = text[text.index("(") + 1 : text.rindex(") ->")]
        parts = re.split(r", (?=\w+: )", inside)[1:]
        found.append([(part.split(":")[0], " = " not in part) for part in parts])
    return found


def fits(call: ast.Call, known: list[list[tuple[str, bool]]]) -> bool:
    """Whether one of the signatures takes a call's arguments."""
    given, keywords = len(call.args), {keyword.arg for keyword in call.keywords}
    return any(
        given <= len(parameters)
        and keywords <= {name for name, _ in parameters[given:]}
        and all(name in keywords for name, required in parameters[given:] if required)
        for parameters in known
    )


def main(module: str, target: str) -> None:
    bindings = Bindings(module, target)
    print(
        json.dumps(
            {
                "version": bindings.trt.__version__,
                "names": len({ast.unparse(node) for node in bindings.names()}),
                "calls": len({ast.unparse(call) for call in bindings.calls()}),
                "problems": list(bindings.problems()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
