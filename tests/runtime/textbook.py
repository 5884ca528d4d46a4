"""The loop in plain Python, for one environment: what `rsd_trt.runtime.policy.Policy` is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scripted import Frame, Step

Verdict = Callable[[Sequence[Step], Sequence[Step], int, int], int]  # guess, left, the query's number, age -> steps


def textbook(
    frames: Sequence[Frame], verdict: Verdict, n: int, m: int, refresh: int | None
) -> list[tuple[str, list[Step]]]:
    """The route and the actions of each query."""
    out: list[tuple[str, list[Step]]] = []
    chunk: list[Step] = []
    age, made_for = 0, ""
    for number, frame in enumerate(frames):
        left = chunk[age:]
        if not chunk:
            route = "start"
        elif frame.instruction != made_for:
            route = "instruction"
        elif not left:
            route = "exhausted"
        elif left[0][1] != chunk[age - 1][1]:
            route = "gripper"
        elif refresh is not None and age >= refresh:
            route = "refresh"
        else:
            held = 0
            while held < len(left) and left[held][1] == chunk[age - 1][1]:
                held += 1
            count = min(verdict(frame.draft, left, number, age), held, m)
            if count and frame.nan != "draft":
                out.append(("accepted" if count == min(m, len(left)) else "partial", left[:count]))
                age += count
                continue
            route = "rejected"
        chunk, age, made_for = list(frame.main), n, frame.instruction
        out.append((route, chunk[:n]))
    return out


def first(guess: Sequence[Step], left: Sequence[Step], number: int, age: int) -> int:
    return len(left) if guess[0] == left[0] else 0


def actions(guess: Sequence[Step], left: Sequence[Step], number: int, age: int) -> int:
    count = 0
    while count < len(left) and guess[count] == left[count]:
        count += 1
    return count
