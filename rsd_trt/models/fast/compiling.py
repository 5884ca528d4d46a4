"""How torch.compile is used, by the backbone and by the components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOST_SHAPES = 256  # batches, prompt lengths and places that a module is compiled for


def compile_arguments() -> dict[str, Any]:
    """What torch.compile is called with. A shape that is not compiled would run eagerly, and slowly: so there is room
    for all, and none is passed over."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Padded strides would have every attention output copied.
    options: dict[str, str | int | bool | Callable[..., object]] = {"comprehensive_padding": False}
    return {"dynamic": False, "options": options}
