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
- The rim point is chosen among directions around the bowl: high on a tilted bowl, within reach, clear of obstacles
  for the open fingers and for the hand above them, with little turning of the wrist. Beside a wall the hand
  aims further inside the bowl, and the closing fingers drag the bowl away from the wall.
- Lengths are metres, angles radians, z points up. The robot's base is at negative x, and looks along +x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjSim

Array = NDArray[np.float64]

# LIBERO's OSC_POSE environment convention.
POSITION_SCALE = 0.05  # m of an action of 1
ROTATION_SCALE = 0.5  # rad of an action of 1
OPEN, CLOSE = -1.0, 1.0
POSITION_GAIN = 2.0
ROTATION_GAIN = 1.0
LIFT_LIMIT = 0.6  # largest action upwards with the bowl
LOWER_LIMIT = 0.8  # largest action downwards onto the plate
TURN_LIMIT = 0.6  # largest rotation action
FREE_TILT = 0.1  # rad off the vertical that is not corrected: turning the hand disturbs its position

# The bowl, in its own frame: the origin is at the middle of its foot, z is its axis.
RIM_HEIGHT, RIM_RADIUS = 0.052, 0.049
BOWL_RADIUS = 0.055  # outside, at the rim
FOOT_RADIUS = 0.034
WALL_SLOPE = 0.255  # rad between the wall and the axis, near the rim

# The gripper, in the grip site's frame: x across the fingers' width, y the way they open, z out of the hand.
WIDE_OPEN = 0.078  # distance between the pads
FINGER_CLOSED, FINGER_FAR = 0.012, 0.065  # what a finger sweeps on its side of the wall as it closes
FINGER_WIDTH = 0.011  # half
FINGER_TIP = 0.0092  # beyond the grip site
HAND_BOTTOM = 0.031  # behind the grip site
HAND_LENGTH, HAND_WIDTH = 0.104, 0.032  # half, along y and x

# Choosing the rim point.
GRASP_HEIGHT = 0.036  # m of the grip site over the bowl's foot
GRASP_RADII = ((0.047, 0.0), (0.036, 0.3), (0.028, 0.4))  # m of the grip site from the bowl's axis, and their cost
CENTRE_RADIUS = 0.047
DIRECTIONS = 24  # rim points, evenly around the bowl
CLEARANCE = 0.005  # m that is enough between gripper and obstacles
HEIGHT_CLEARANCE = 0.001  # m that is enough between the gripper and what is below
CLEARANCE_COST = 2000.0  # per m that is missing
HEIGHT_COST = 20.0  # per m below the highest rim point
TURN_COST = 0.25  # per rad of the wrist from its usual yaw
BASE_POSITION = np.array([-0.66, 0.0, 0.912])  # the robot's
COMFORTABLE_REACH = 0.74  # m from the robot's base in the plane, with the hand pointing down
REACH_COST = 10.0  # per m beyond, at the grasp and over the plate
MAX_YAW = 2.0  # rad of the wrist to either side of its usual yaw

# Phases.
FIRM = (0.012, 0.02)
HELD_OPENING = 0.02  # m, fingers on the rim are closer than this
EMPTY_OPENING = 0.0005  # m, fingers closer than this have nothing between them
OFF_CENTRE = 0.032  # m, the most between the grip site and the wall, to close
PAD_SLACK = 0.004  # m, the wall's thickness and bend, in that test
SHALLOWEST, DEEPEST = 0.008, 0.040  # m of the grip site below the rim, to close; closed fingers may be shallower
MISALIGNED = 0.5  # rad between the way the fingers open and the wall's normal, to close
PLACED_OFFSET = 0.024  # m, from the plate's middle; the task asks for 0.03
PLACED_HEIGHT = 0.008  # m, of the bowl's lowest point over the plate's origin

# Funnels.
CLEAR = 0.035  # m over the grasp from where the open fingers pass over the rim
HOVER = 0.07  # m over the grasp, until the hand is over the grasp point
APPROACH_SLOPE = 3.0  # m of height per m of horizontal error
APPROACH_SLACK = 0.008  # m of horizontal error that needs no height
TURN_SLOPE = 0.15  # m of height per rad of yaw error
TURN_SLACK = 0.15  # rad
OPEN_SLOPE = 2.0  # m of height per m that the fingers lack to wide open
OPEN_SLACK = 0.01
CARRY = 0.075  # m of the bowl over the plate while it is far
CARRY_SLOPE = 1.5
CARRY_SLACK = 0.012
OBSTACLE_MARGIN = 0.025  # m of the carried bowl over obstacles
OBSTACLE_SLOPE = 3.0  # m that the required height falls per m of distance
PLATE_REACH = (0.03, 0.08)  # m from the plate's middle: no obstacle counts at the first, all count from the second
GATE = 0.02  # m of missing height at which horizontal motion stops
PRESS = 0.02  # m below contact that lowering aims for
RETREAT = 0.12  # m over the placed bowl


@dataclass(frozen=True)
class Columns:
    """Obstacles, seen from above: upright boxes that reach from the ground to their tops."""

    centre: Array  # [n, 2]
    along: Array  # [n, 2], unit vectors: the direction of one pair of sides
    half: Array  # [n, 2], half edge lengths, along that direction and across it
    top: Array  # [n], m

    def distance(self, points: Array) -> Array:
        """Signed horizontal distances [p, n] of points [p, 2]; negative inside."""
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
    """All that the expert looks at, in the world frame; quaternions are [x, y, z, w]."""

    eef_position: Array  # [3], the grip site, between the fingertips
    eef_quaternion: Array  # [4]
    opening: float  # distance between the pads
    bowl_position: Array  # [3], the target's
    bowl_quaternion: Array  # [4]
    plate_position: Array  # [3]
    obstacles: Columns


@dataclass(frozen=True)
class Grasp:
    """Where the grip site has to be, and how the hand is turned, for the fingers to close on the rim."""

    position: Array  # [3]
    yaw: float  # rad


def expert_action(state: SceneState) -> NDArray[np.float32]:
    """The action [7] in [-1, 1] (dx dy dz droll dpitch dyaw gripper), from this state alone."""
    if is_placed(state):
        return _action(np.array([0.0, 0.0, _rise(state)]), _upright(state), OPEN)
    if has_rim(state):
        if state.opening < HELD_OPENING:
            return _action(_carry(state) * float(np.interp(state.opening, FIRM, (1.0, 0.0))), _upright(state), CLOSE)
        free = min(state.opening / WIDE_OPEN, 1.0) ** 2  # closing fingers hold the hand where the bowl is
        return _action(free * _to_rim(state), _upright(state), CLOSE)
    grasp = choose_grasp(state)
    return _action(_approach(state, grasp), _turn(state, grasp.yaw), OPEN)


def is_placed(state: SceneState) -> bool:
    """Whether the bowl stands on the plate, or is so low over it that it may be let go."""
    up = _axes(state.bowl_quaternion)[:, 2]
    lowest = state.bowl_position[2] - FOOT_RADIUS * float(np.hypot(up[0], up[1]))
    offset = np.linalg.norm((state.bowl_position - state.plate_position)[:2])
    return bool(offset < PLACED_OFFSET and lowest < state.plate_position[2] + PLACED_HEIGHT)


def has_rim(state: SceneState) -> bool:
    """Whether the rim, anywhere around the bowl, is between the fingers."""
    axes = _axes(state.bowl_quaternion)
    local = axes.T @ (state.eef_position - state.bowl_position)
    radius = max(float(np.hypot(local[0], local[1])), 1e-6)
    normal, open_way = axes[:2, :2] @ local[:2], _axes(state.eef_quaternion)[:2, 1]
    aligned = abs(normal @ open_way) > np.cos(MISALIGNED) * np.linalg.norm(normal) * np.linalg.norm(open_way)
    between = abs(radius - RIM_RADIUS) < min(state.opening / 2 + PAD_SLACK, OFF_CENTRE)
    shallowest = SHALLOWEST * min(state.opening / WIDE_OPEN, 1.0)
    deep = shallowest < RIM_HEIGHT - local[2] < DEEPEST
    return bool(state.opening > EMPTY_OPENING and aligned and between and deep)


def _to_rim(state: SceneState) -> Array:
    """The displacement [3] to the grasp at the rim point that is nearest to the hand."""
    axes = _axes(state.bowl_quaternion)
    local = axes.T @ (state.eef_position - state.bowl_position)
    radius = max(float(np.hypot(local[0], local[1])), 1e-6)
    target = np.append(CENTRE_RADIUS / radius * local[:2], GRASP_HEIGHT)
    return state.bowl_position + axes @ target - state.eef_position


def choose_grasp(state: SceneState) -> Grasp:
    """The cheapest rim point: see the module's notes."""
    positions, yaws, costs = _candidates(state)
    near = state.obstacles.distance(state.bowl_position[None, :2])[0] < RIM_RADIUS + HAND_LENGTH + HAND_WIDTH
    obstacles = state.obstacles.where(near)
    best, lowest = 0, np.inf
    for i in np.argsort(costs):
        if costs[i] >= lowest:
            break
        cost = costs[i] + CLEARANCE_COST * max(CLEARANCE - _clearance(obstacles, positions[i], yaws[i]), 0.0)
        if cost < lowest:
            best, lowest = int(i), cost
    return Grasp(positions[best], float(yaws[best]))


def _candidates(state: SceneState) -> tuple[Array, Array, Array]:
    """Grasps around the bowl: positions [c, 3], yaws [c] and their costs [c] without obstacles."""
    up = _axes(state.bowl_quaternion)[:, 2]
    angle = np.tile(np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS), len(GRASP_RADII))
    radius, inside = np.repeat(np.array(GRASP_RADII), DIRECTIONS, axis=0).T
    side = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)  # [c, 3]
    out = side - (side @ up)[:, None] * up
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    normal = np.cos(WALL_SLOPE) * out - np.sin(WALL_SLOPE) * up  # of the wall's outside
    yaw = (np.arctan2(normal[:, 1], normal[:, 0])) % np.pi - np.pi / 2  # either finger may be the outer one
    position = state.bowl_position + GRASP_HEIGHT * up + radius[:, None] * out
    rim = out[:, 2] * RIM_RADIUS  # the height of the rim point, but for a constant
    cost = (
        inside
        + HEIGHT_COST * (rim.max() - rim)
        + TURN_COST * np.abs(yaw)
        + REACH_COST * (_overreach(position) + _overreach(state.plate_position + position - state.bowl_position))
    )
    return position, yaw, cost


def _overreach(positions: Array) -> Array:
    """[n], m that positions [n, 3] are beyond the comfortable reach."""
    return np.maximum(np.linalg.norm((positions - BASE_POSITION)[:, :2], axis=1) - COMFORTABLE_REACH, 0.0)


def _clearance(obstacles: Columns, position: Array, yaw: float) -> float:
    """The room around the open gripper, pointing down with its grip site at `position`."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, sin], [-sin, cos]])
    least = np.inf
    for points, bottom in GRIPPER_PARTS:
        high = obstacles.where(obstacles.top > position[2] + bottom - HEIGHT_CLEARANCE)
        if len(high.top):
            least = min(least, float(high.distance(position[:2] + points @ turn).min()))
    return least


def _outline(width: float, start: float, end: float) -> Array:
    """[p, 2], points along the two long sides of a part of the gripper, and of its mirror image."""
    y = np.arange(start, end + CLEARANCE, 2 * CLEARANCE)
    return np.array([(x, side * min(d, end)) for side in (-1.0, 1.0) for x in (-width, width) for d in y])


GRIPPER_PARTS = (  # the outline of what the closing fingers sweep and of the hand, and their heights over the grip site
    (_outline(FINGER_WIDTH, FINGER_CLOSED, FINGER_FAR), -FINGER_TIP),
    (_outline(HAND_WIDTH, 0.0, HAND_LENGTH), HAND_BOTTOM),
)


def _approach(state: SceneState, grasp: Grasp) -> Array:
    """The displacement [3] towards the grasp: over it first, then down."""
    error = grasp.position - state.eef_position
    height = (
        APPROACH_SLOPE * max(float(np.hypot(error[0], error[1])) - APPROACH_SLACK, 0.0)
        + TURN_SLOPE * max(abs(float(_turn(state, grasp.yaw)[2])) - TURN_SLACK, 0.0)
        + OPEN_SLOPE * max(WIDE_OPEN - OPEN_SLACK - state.opening, 0.0)
    )
    error[:2] *= _gate(error[2] + min(height, CLEAR))
    error[2] += min(height, HOVER)
    return error


def _carry(state: SceneState) -> Array:
    """The displacement [3] of the held bowl towards the plate: up first, then over it, then down."""
    error = state.plate_position - state.bowl_position
    offset = float(np.hypot(error[0], error[1]))
    error[2] += min(CARRY_SLOPE * max(offset - CARRY_SLACK, 0.0), CARRY)
    share = float(np.interp(offset, PLATE_REACH, (0.0, 1.0)))
    error[2] += share * max(_required_height(state) - state.bowl_position[2] - error[2], 0.0)
    error[:2] *= _gate(error[2])
    if offset < CARRY_SLACK:
        error[2] -= PRESS
    error[2] = np.clip(error[2], -LOWER_LIMIT * POSITION_SCALE, LIFT_LIMIT * POSITION_SCALE) / POSITION_GAIN
    return error


def _required_height(state: SceneState) -> float:
    """How high the bowl has to be to move sideways: over the obstacles that are near it in the plane."""
    obstacles = state.obstacles
    distance = obstacles.distance(state.bowl_position[None, :2])[0]
    beyond = np.maximum(distance - BOWL_RADIUS - OBSTACLE_MARGIN, 0.0)
    return float(np.max(obstacles.top + OBSTACLE_MARGIN - OBSTACLE_SLOPE * beyond, initial=-np.inf))


def _gate(missing_height: float) -> float:
    """The share of the horizontal motion that is allowed while height is missing."""
    return float(np.clip(1.0 - missing_height / GATE, 0.0, 1.0))


def _rise(state: SceneState) -> float:
    """The displacement upwards of a hand that has let go."""
    if state.opening < HELD_OPENING:
        return 0.0
    return float(max(state.bowl_position[2] + RETREAT - state.eef_position[2], 0.0))


def _upright(state: SceneState) -> Array:
    """The rotation vector [3] towards a hand that points down, without turning it about the vertical."""
    down = _axes(state.eef_quaternion)[:, 2]
    axis = np.cross(down, [0.0, 0.0, -1.0])
    sine = float(np.linalg.norm(axis))
    tilt = float(np.arctan2(sine, -down[2]))
    return axis / sine * (tilt - FREE_TILT) if tilt > FREE_TILT and sine > 0.0 else np.zeros(3)


def _turn(state: SceneState, yaw: float) -> Array:
    """The rotation vector [3] to a hand that points straight down and is turned to `yaw`, or to its mirror image."""
    across = _axes(state.eef_quaternion)[:, 0]
    current = float(np.arctan2(across[1], across[0]))
    options = [option for option in (yaw - np.pi, yaw, yaw + np.pi) if abs(option) <= MAX_YAW]
    target = min(options, key=lambda option: abs(option - current))
    vector = _upright(state)
    vector[2] += target - current
    return vector


def _action(displacement: Array, rotation: Array, gripper: float) -> NDArray[np.float32]:
    """The horizontal part and the rotation are shortened, rather than clipped, so that they keep their directions."""
    horizontal = _shorten(POSITION_GAIN * displacement[:2] / POSITION_SCALE, 1.0)
    vertical = np.clip(POSITION_GAIN * displacement[2:] / POSITION_SCALE, -1.0, 1.0)
    turning = _shorten(ROTATION_GAIN * rotation / ROTATION_SCALE, TURN_LIMIT)
    return np.concatenate([horizontal, vertical, turning, [gripper]]).astype(np.float32)


def _shorten(vector: Array, limit: float) -> Array:
    largest = float(np.abs(vector).max())
    return vector * (limit / largest) if largest > limit else vector


def _axes(quaternion: Array) -> Array:
    """The rotation matrix [3, 3] of a unit quaternion [x, y, z, w]."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


TARGET = "akita_black_bowl_1"
NOT_OBSTACLES = (TARGET, "plate_1", "robot0", "gripper0", "mount0", "table", "world")
BOX = 6  # mujoco.mjtGeom.mjGEOM_BOX


def scene_state(raw: Mapping[str, Array], sim: MjSim) -> SceneState:
    """The scene from robosuite's raw observation and its simulation (for the obstacles)."""
    model, data = sim.model, sim.data
    relevant = np.array([not name.startswith(NOT_OBSTACLES) for name in model.body_names])
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    chosen = relevant[model.geom_bodyid] & collides & (model.geom_type == BOX)
    fingers = raw["robot0_gripper_qpos"]
    return SceneState(
        eef_position=np.array(raw["robot0_eef_pos"]),
        eef_quaternion=np.array(raw["robot0_eef_quat"]),
        opening=float(fingers[0] - fingers[1]),
        bowl_position=np.array(raw[f"{TARGET}_pos"]),
        bowl_quaternion=np.array(raw[f"{TARGET}_quat"]),
        plate_position=np.array(raw["plate_1_pos"]),
        obstacles=_columns(
            np.array(data.geom_xpos[chosen]),
            np.array(data.geom_xmat[chosen]).reshape(-1, 3, 3),
            np.array(model.geom_size[chosen]),
        ),
    )


def _columns(centre: Array, rotation: Array, half: Array) -> Columns:
    """The upright boxes around boxes: centres [n, 3], axes [n, 3, 3] in columns, half edge lengths [n, 3]."""
    flat = rotation[:, :2, :]  # [n, 2, 3]
    lengths = np.linalg.norm(flat, axis=1)
    level = np.argmax(lengths, axis=1)
    rows = np.arange(len(level))
    along = flat[rows, :, level] / lengths[rows, level, None]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    extent = [np.einsum("nj,nj->n", np.abs(np.einsum("ni,nij->nj", d, flat)), half) for d in (along, across)]
    top = centre[:, 2] + np.einsum("nj,nj->n", np.abs(rotation[:, 2, :]), half)
    return Columns(centre[:, :2], along, np.stack(extent, axis=1), top)
