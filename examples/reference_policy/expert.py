"""A scripted expert for libero_spatial: put the black bowl on the plate, from the poses of the objects.

The expert has no memory. Each action depends only on the scene at hand, so it can take over anywhere in an
episode, and label the states that another policy visits. The phase is read off geometry:

    placed    the bowl stands on the plate               open, rise
    held      the rim is between nearly closed fingers   lift, carry to the plate, lower
    grasp     the rim is between the fingers             close
    approach  everything else                            open, come down on the chosen rim point from above

Non-obvious:
- Whether the rim is between the fingers is asked of the whole rim, not of the chosen point, and with all the room
  that the fingers' opening leaves. A hand that is pushed about while it closes therefore goes on closing.
- Heights are funnels over the horizontal error (come down only as far as the error allows), not switches.
- The rim point is chosen among directions around the bowl: clear of obstacles for the open fingers and for the
  hand above them, high on a tilted bowl, with little turning of the wrist.
- Obstacles count from the ground up to their tops: the walls of a drawer are so thin that the depth of a
  collision says little, so that too small a distance costs more than all else together.
- Lengths are metres, angles radians, z points up. The robot's base is at negative x, and looks along +x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.eval.libero.target import GRASP_HEIGHT, GRASP_RADIUS, TARGET

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjSim

Array = NDArray[np.float64]

# LIBERO's OSC_POSE environment convention, and how the expert uses it.
POSITION_SCALE = 0.05  # m of an action of 1
ROTATION_SCALE = 0.5  # rad of an action of 1
OPEN, CLOSE = -1.0, 1.0
POSITION_GAIN = 2.0  # the controller hardly answers to small errors
LIFT_LIMIT = 0.6  # largest action upwards with the bowl
TURN_LIMIT = 0.6  # largest rotation action
FREE_TILT = 0.1  # rad off the vertical that is not corrected: turning the hand perturbs its position

# The bowl, in its own frame: the origin is at the middle of its foot, z is its axis.
RIM_HEIGHT, RIM_RADIUS = 0.052, 0.049
BOWL_RADIUS = 0.055  # outside, at the rim
FOOT_RADIUS = 0.034

# The gripper, from the grip site between its fingertips.
WIDE_OPEN = 0.078  # between the pads
FINGER_NEAR, FINGER_FAR, FINGER_WIDTH = 0.012, 0.065, 0.011  # what a closing finger sweeps, and half its width
FINGER_TIP = 0.0092  # below
HAND_BOTTOM = 0.031  # above
HAND_LENGTH, HAND_WIDTH = 0.104, 0.032  # half, along the way that the fingers open and across it

# The choice of the rim point.
DIRECTIONS = 24  # evenly around the bowl
CLEARANCE = 0.005  # that is enough between gripper and obstacles
HEIGHT_CLEARANCE = 0.001  # that is enough over obstacles
CLEARANCE_COST = 2000.0  # per m that is missing
HEIGHT_COST = 5.0  # per m below the highest rim point
TURN_COST = 0.25  # per rad of the wrist from its usual yaw
MAX_YAW = 2.0  # rad of the wrist to either side of its usual yaw

# Phases.
PLACED_OFFSET = 0.024  # from the plate's middle; the task asks for 0.03
PLACED_HEIGHT = 0.008  # of the bowl's lowest point over the plate's origin
HELD_OPENING = (0.012, 0.02)  # fingers on the rim are closer than the second, and firmly closed at the first
OFF_CENTRE = 0.032  # between the grip site and the wall, to close
PAD_SLACK = 0.004  # the wall's thickness and bend, in that test
SHALLOWEST, DEEPEST = 0.008, 0.040  # of the grip site below the rim, to close; closed fingers may be shallower
MISALIGNED = 0.5  # rad between the way the fingers open and the wall's normal, to close

# Funnels: heights over the goal, slopes in m per m (or per rad) of an error, and errors that need no height.
HOVER = 0.07  # of the hand while it is far from the grasp
CLEAR = 0.035  # from where on the open fingers pass over the rim
APPROACH_SLOPE, APPROACH_SLACK = 3.0, 0.008
TURN_SLOPE, TURN_SLACK = 0.15, 0.15
OPEN_SLOPE, OPEN_SLACK = 2.0, 0.01
CARRY = 0.075  # of the bowl over the plate while it is far
CARRY_SLOPE, CARRY_SLACK = 1.5, 0.012
OBSTACLE_MARGIN = 0.025  # of the carried bowl over obstacles, and beside them
OBSTACLE_SLOPE = 3.0  # m that the required height falls per m of distance
PLATE_REACH = (0.03, 0.08)  # from the plate's middle: no obstacle counts at the first, all count from the second
GATE = 0.02  # missing height at which horizontal motion stops
PRESS = 0.02  # below contact that lowering aims for
RETREAT = 0.12  # of the hand over the placed bowl


@dataclass(frozen=True)
class Columns:
    """Obstacles: upright boxes that reach from the ground to their tops."""

    centre: Array  # [n, 2], m
    along: Array  # [n, 2], unit vectors, the direction of two of the sides
    half: Array  # [n, 2], m, half edge lengths along that direction and across it
    top: Array  # [n], m

    def distance(self, points: Array) -> Array:
        """Signed horizontal distances [p, n] (m) of points [p, 2]; negative inside."""
        offset = points[:, None, :] - self.centre
        across = np.stack([-self.along[:, 1], self.along[:, 0]], axis=1)
        local = np.stack([(offset * self.along).sum(axis=-1), (offset * across).sum(axis=-1)], axis=-1)
        outside = np.abs(local) - self.half
        return np.linalg.norm(np.maximum(outside, 0.0), axis=-1) + np.minimum(outside.max(axis=-1), 0.0)

    def where(self, chosen: NDArray[np.bool_]) -> Columns:
        """Those of the mask [n]."""
        return Columns(self.centre[chosen], self.along[chosen], self.half[chosen], self.top[chosen])


@dataclass(frozen=True)
class SceneState:
    """All that the expert looks at, in the world frame; the columns of a rotation are the body's axes."""

    hand_position: Array  # [3], m, the grip site
    hand_rotation: Array  # [3, 3]: x across the fingers, y the way they open, z out of the hand
    opening: float  # m between the pads
    bowl_position: Array  # [3], m, the target's
    bowl_rotation: Array  # [3, 3]
    plate_position: Array  # [3], m
    obstacles: Columns  # everything but robot, target bowl, plate and table

    @property
    def hand_in_bowl(self) -> tuple[Array, float]:
        """The grip site [3] (m) in the bowl's frame, and its distance from the bowl's axis (never 0)."""
        local = self.bowl_rotation.T @ (self.hand_position - self.bowl_position)
        return local, max(float(np.hypot(local[0], local[1])), 1e-6)


def expert_action(state: SceneState) -> NDArray[np.float32]:
    """The action [7] in [-1, 1] (dx dy dz droll dpitch dyaw gripper), from this state alone."""
    if is_placed(state):
        return _action(np.array([0.0, 0.0, _rise(state)]), _upright(state), OPEN)
    if has_rim(state):
        firm = float(np.interp(state.opening, HELD_OPENING, (1.0, 0.0)))
        free = min(state.opening / WIDE_OPEN, 1.0) ** 2  # closing fingers hold the hand where the bowl is
        return _action(firm * _carry(state) if firm > 0.0 else free * _to_rim(state), _upright(state), CLOSE)
    position, yaw = choose_grasp(state)
    turn = _turn(state, yaw)
    return _action(_approach(state, position, float(turn[2])), turn, OPEN)


def is_placed(state: SceneState) -> bool:
    """Whether the bowl stands on the plate, or is so low over it that it may be let go."""
    lowest = state.bowl_position[2] - FOOT_RADIUS * np.linalg.norm(state.bowl_rotation[:2, 2])
    offset = np.linalg.norm((state.bowl_position - state.plate_position)[:2])
    return bool(offset < PLACED_OFFSET and lowest < state.plate_position[2] + PLACED_HEIGHT)


def has_rim(state: SceneState) -> bool:
    """Whether the rim, anywhere around the bowl, is between the fingers."""
    local, radius = state.hand_in_bowl
    normal, open_way = state.bowl_rotation[:2, :2] @ local[:2], state.hand_rotation[:2, 1]
    aligned = abs(normal @ open_way) > np.cos(MISALIGNED) * np.linalg.norm(normal) * np.linalg.norm(open_way)
    between = abs(radius - RIM_RADIUS) < min(state.opening / 2 + PAD_SLACK, OFF_CENTRE)
    deep = SHALLOWEST * min(state.opening / WIDE_OPEN, 1.0) < RIM_HEIGHT - local[2] < DEEPEST
    return bool(aligned and between and deep)


def choose_grasp(state: SceneState) -> tuple[Array, float]:
    """The position [3] (m) of the grip site and the yaw (rad) of the hand to close on the cheapest rim point."""
    up = state.bowl_rotation[:, 2]
    angle = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    side = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)
    out = side - (side @ up)[:, None] * up  # [c, 3], from the bowl's axis to the rim
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    positions = state.bowl_position + GRASP_HEIGHT * up + GRASP_RADIUS * out
    yaws = np.arctan2(out[:, 1], out[:, 0]) % np.pi - np.pi / 2  # either finger may be the outer one
    costs = HEIGHT_COST * RIM_RADIUS * (out[:, 2].max() - out[:, 2]) + TURN_COST * np.abs(yaws)
    around = state.obstacles.distance(state.bowl_position[None, :2])[0] < RIM_RADIUS + HAND_LENGTH + HAND_WIDTH
    obstacles = state.obstacles.where(around)
    best, lowest = 0, np.inf
    for i in np.argsort(costs):
        if costs[i] >= lowest:
            break
        cost = costs[i] + CLEARANCE_COST * max(CLEARANCE - _clearance(obstacles, positions[i], yaws[i]), 0.0)
        if cost < lowest:
            best, lowest = int(i), cost
    return positions[best], float(yaws[best])


def _clearance(obstacles: Columns, position: Array, yaw: float) -> float:
    """The room (m) around the open gripper, pointing down with its grip site at `position`."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, sin], [-sin, cos]])
    least = np.inf
    for outline, bottom in GRIPPER_PARTS:
        high = obstacles.where(obstacles.top > position[2] + bottom - HEIGHT_CLEARANCE)
        if len(high.top):
            least = min(least, float(high.distance(position[:2] + outline @ turn).min()))
    return least


def _outline(width: float, start: float, end: float) -> Array:
    """[p, 2], points along the sides of a part of the gripper and of its mirror image (across, along its opening)."""
    y = np.append(np.arange(start, end, 2 * CLEARANCE), end)
    return np.array([(x, side * d) for side in (-1.0, 1.0) for x in (-width, width) for d in y])


GRIPPER_PARTS = (  # the outlines of what closing fingers sweep and of the hand, and their heights over the grip site
    (_outline(FINGER_WIDTH, FINGER_NEAR, FINGER_FAR), -FINGER_TIP),
    (_outline(HAND_WIDTH, 0.0, HAND_LENGTH), HAND_BOTTOM),
)


def _approach(state: SceneState, goal: Array, turn: float) -> Array:
    """The displacement [3] (m) towards the goal: over it first, then down, with `turn` (rad) of yaw still to go."""
    error = goal - state.hand_position
    height = (
        APPROACH_SLOPE * max(float(np.hypot(error[0], error[1])) - APPROACH_SLACK, 0.0)
        + TURN_SLOPE * max(abs(turn) - TURN_SLACK, 0.0)
        + OPEN_SLOPE * max(WIDE_OPEN - OPEN_SLACK - state.opening, 0.0)
    )
    error[:2] *= _gate(error[2] + min(height, CLEAR))
    error[2] += min(height, HOVER)
    return error


def _to_rim(state: SceneState) -> Array:
    """The displacement [3] (m) to the grasp at the rim point that is nearest to the hand."""
    local, radius = state.hand_in_bowl
    goal = np.append(GRASP_RADIUS / radius * local[:2], GRASP_HEIGHT)
    return state.bowl_rotation @ (goal - local)


def _carry(state: SceneState) -> Array:
    """The displacement [3] (m) of the held bowl towards the plate: up first, then over it, then down."""
    error = state.plate_position - state.bowl_position
    offset = float(np.hypot(error[0], error[1]))
    error[2] += min(CARRY_SLOPE * max(offset - CARRY_SLACK, 0.0), CARRY)
    share = float(np.interp(offset, PLATE_REACH, (0.0, 1.0)))
    error[2] += share * max(_required_height(state) - state.bowl_position[2] - error[2], 0.0)
    error[:2] *= _gate(error[2])
    if offset < CARRY_SLACK:
        error[2] -= PRESS
    error[2] = min(error[2], LIFT_LIMIT * POSITION_SCALE / POSITION_GAIN)
    return error


def _required_height(state: SceneState) -> float:
    """How high (m) the bowl has to be to move sideways: over the obstacles that are near it."""
    distance = state.obstacles.distance(state.bowl_position[None, :2])[0]
    beyond = np.maximum(distance - BOWL_RADIUS - OBSTACLE_MARGIN, 0.0)
    return float(np.max(state.obstacles.top + OBSTACLE_MARGIN - OBSTACLE_SLOPE * beyond, initial=-np.inf))


def _gate(missing_height: float) -> float:
    """The share of the horizontal motion that is allowed while height (m) is missing."""
    return float(np.clip(1.0 - missing_height / GATE, 0.0, 1.0))


def _rise(state: SceneState) -> float:
    """The displacement (m) upwards of a hand that has let go."""
    let_go = state.opening > HELD_OPENING[1]
    return max(float((state.bowl_position - state.hand_position)[2]) + RETREAT, 0.0) if let_go else 0.0


def _upright(state: SceneState) -> Array:
    """The rotation vector [3] (rad) towards a hand that points down, without turning it about the vertical."""
    axis = np.cross(state.hand_rotation[:, 2], [0.0, 0.0, -1.0])
    sine = float(np.linalg.norm(axis))
    tilt = float(np.arctan2(sine, -state.hand_rotation[2, 2]))
    return axis / sine * (tilt - FREE_TILT) if sine > 0.0 and tilt > FREE_TILT else np.zeros(3)


def _turn(state: SceneState, yaw: float) -> Array:
    """The rotation vector [3] (rad) to a hand that points down and is turned to `yaw`, or to its mirror image."""
    current = float(np.arctan2(state.hand_rotation[1, 0], state.hand_rotation[0, 0]))
    options = [option for option in (yaw - np.pi, yaw, yaw + np.pi) if abs(option) <= MAX_YAW]
    vector = _upright(state)
    vector[2] += min((option - current for option in options), key=abs)
    return vector


def _action(displacement: Array, rotation: Array, gripper: float) -> NDArray[np.float32]:
    """The horizontal part and the rotation are shortened, rather than clipped, so that they keep their directions."""
    wanted = POSITION_GAIN / POSITION_SCALE * displacement
    horizontal, vertical = _shorten(wanted[:2], 1.0), np.clip(wanted[2:], -1.0, 1.0)
    turning = _shorten(rotation / ROTATION_SCALE, TURN_LIMIT)
    return np.concatenate([horizontal, vertical, turning, [gripper]]).astype(np.float32)


def _shorten(vector: Array, limit: float) -> Array:
    return vector * (limit / max(float(np.abs(vector).max()), limit))


NOT_OBSTACLES = (TARGET, "plate_1", "robot0", "gripper0", "mount0", "table", "world")
BOX = 6  # mujoco.mjtGeom.mjGEOM_BOX


def scene_state(raw: Mapping[str, Array], sim: MjSim) -> SceneState:
    """The scene from robosuite's raw observation and its simulation (for the obstacles)."""
    model, data = sim.model, sim.data
    solid = np.array([not name.startswith(NOT_OBSTACLES) for name in model.body_names])[model.geom_bodyid]
    solid &= ((model.geom_contype != 0) | (model.geom_conaffinity != 0)) & (model.geom_type == BOX)
    fingers = raw["robot0_gripper_qpos"]
    return SceneState(
        hand_position=np.array(raw["robot0_eef_pos"]),
        hand_rotation=_matrix(raw["robot0_eef_quat"]),
        opening=float(fingers[0] - fingers[1]),
        bowl_position=np.array(raw[f"{TARGET}_pos"]),
        bowl_rotation=_matrix(raw[f"{TARGET}_quat"]),
        plate_position=np.array(raw["plate_1_pos"]),
        obstacles=_columns(data.geom_xpos[solid], data.geom_xmat[solid].reshape(-1, 3, 3), model.geom_size[solid]),
    )


def _columns(centre: Array, rotation: Array, half: Array) -> Columns:
    """The columns around boxes: centres [n, 3], rotations [n, 3, 3], half edge lengths [n, 3], all m."""
    flat = rotation[:, :2, :]  # [n, 2, 3], the boxes' axes seen from above
    lengths = np.linalg.norm(flat, axis=1)
    rows, level = np.arange(len(lengths)), np.argmax(lengths, axis=1)
    along = flat[rows, :, level] / lengths[rows, level, None]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    extent = [(np.abs(np.einsum("ni,nij->nj", way, flat)) * half).sum(axis=1) for way in (along, across)]
    top = centre[:, 2] + (np.abs(rotation[:, 2, :]) * half).sum(axis=1)
    return Columns(centre[:, :2], along, np.stack(extent, axis=1), top)


def _matrix(quaternion: Array) -> Array:
    """The rotation [3, 3] of a unit quaternion [x, y, z, w]."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
