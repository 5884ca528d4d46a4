"""A scripted expert for libero_spatial: put the black bowl on the plate, from the poses of the objects.

The expert has no memory. Each action depends only on the scene at hand, so it can take over anywhere in an
episode, and label the states that another policy visits. The phase is read off geometry:

    placed    the bowl stands on the plate                         open, rise
    held      closed fingers on the bowl's rim                     lift, carry to the plate, lower
    grasp     open fingers on both sides of the chosen rim point   close
    approach  everything else                                      open, come down on the rim point from above

Non-obvious:
- What keeps a phase from flickering is geometry too: the tolerance of `grasp` widens as the fingers close, and
  heights are funnels over the horizontal error (come down only as far as the error allows), not switches.
- The rim point is chosen among directions around the bowl: high on a tilted bowl, clear of obstacles for the open
  fingers and for the hand above them, with little turning of the wrist.
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
ACTION_DIM = 7
POSITION_SCALE = 0.05  # m of an action of 1
ROTATION_SCALE = 0.5  # rad of an action of 1
OPEN, CLOSE = -1.0, 1.0

# Gains: the share of an error that one action asks for, and the largest action.
POSITION_GAIN = 1.0
ROTATION_GAIN = 1.0
FREE_TILT = 0.1  # rad off the vertical that is not corrected: turning the hand disturbs its position
LIFT_LIMIT = 0.6  # largest action upwards with the bowl
LOWER_LIMIT = 0.8  # largest action downwards onto the plate
TURN_LIMIT = 0.6  # largest rotation action

# The bowl, in its own frame: the origin is at the middle of its foot, z is its axis.
RIM_HEIGHT, GRASP_RADIUS = 0.052, 0.049  # of the rim, and of the wall near it
GRASPS = (  # height and radius of the grip site on the wall, and what the choice costs
    (0.032, 0.047, 0.0),
    (0.036, 0.048, 0.2),  # shallow, where the hand would touch something
    (0.036, 0.036, 0.4),
    (0.036, 0.028, 0.45),  # and off centre, where the outer finger would: closing drags the bowl to the middle
)
BOWL_RADIUS = 0.055  # outside, at the rim
FOOT_RADIUS = 0.034
WALL_SLOPE = 0.255  # rad between the wall and the axis, near the rim

# The gripper, in the grip site's frame: x across the fingers' width, y the way they open, z out of the hand.
WIDE_OPEN = 0.078  # distance between the pads
FINGER_CLOSED, FINGER_FAR = 0.012, 0.065  # what a finger sweeps on its side of the wall as it closes
FINGER_POINTS = 5  # along that sweep, to test its clearance with
FINGER_WIDTH = 0.011  # half
FINGER_TIP = 0.0096  # beyond the grip site
HAND_BOTTOM = 0.030  # behind the grip site
HAND_LENGTH, HAND_WIDTH = 0.104, 0.032  # half, along y and x
HAND_TOP = 0.06  # up to where it may meet what stands beside the bowl
HAND_POINTS = 9  # along the hand's length, to test its clearance with

# Choosing the rim point.
DIRECTIONS = 24  # rim points, evenly around the bowl
CLEARANCE = 0.005  # m that is enough between gripper and obstacles
CLEARANCE_COST = 400.0  # per m that is missing
HEIGHT_COST = 20.0  # per m below the highest rim point
TURN_COST = 0.25  # per rad of the wrist from its usual yaw
BASE_POSITION = np.array([-0.66, 0.0, 0.912])  # the robot's
COMFORTABLE_REACH = 0.74  # m from the robot's base in the plane, with the hand pointing down
REACH_COST = 10.0  # per m beyond, at the grasp and over the plate
MAX_YAW = 2.0  # rad of the wrist to either side of its usual yaw

# Phases.
HELD_OPENING = 0.02  # m, fingers on the rim are closer than this
EMPTY_OPENING = 0.0005  # m, fingers closer than this have nothing between them
CLOSING_SPEED = (0.005, 0.03)  # m/s between the pads: below the first they grip, above the second they still move
HELD_TOLERANCE = 0.02  # m, between the grip site and the wall
HELD_DEPTH = (-0.005, 0.04)  # m, of the grip site below the rim
GRASP_TOLERANCE = 0.01  # m, to start closing
DEPTH_WEIGHT = 1.7  # of an error in height, in that tolerance
GRASP_SLACK = 0.012  # m, added to it as the fingers close
PLACED_OFFSET = 0.024  # m, from the plate's middle; the task asks for 0.03
PLACED_HEIGHT = 0.008  # m, of the bowl's lowest point over the plate's origin

# Funnels.
HOVER = 0.07  # m over the rim, until the hand is over the grasp point
APPROACH_SLOPE = 4.0  # m of height per m of horizontal error
APPROACH_SLACK = 0.005  # m of horizontal error that needs no height
TURN_SLOPE = 0.15  # m of height per rad of yaw error
TURN_SLACK = 0.1  # rad
OPEN_SLOPE = 2.0  # m of height per m that the fingers lack to wide open
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
class Boxes:
    """Obstacles: the collision boxes of everything but robot, target bowl, plate and table."""

    centre: Array  # [n, 3]
    rotation: Array  # [n, 3, 3], columns are the box's axes
    half: Array  # [n, 3], half edge lengths

    def distance(self, points: Array) -> Array:
        """Signed distances [..., n] of points [..., 3] from each box; negative inside."""
        axes = self.rotation.transpose(1, 0, 2).reshape(3, -1)  # [3, n * 3]: one product for all boxes
        local = (points @ axes).reshape(*points.shape[:-1], *self.half.shape)
        outside = np.abs(local - np.einsum("ni,nij->nj", self.centre, self.rotation)) - self.half
        gap = np.maximum(outside, 0.0)
        return np.sqrt((gap * gap).sum(axis=-1)) + np.minimum(outside.max(axis=-1), 0.0)

    def top(self) -> Array:
        """[n], the height of each box's highest corner."""
        return self.centre[:, 2] + np.einsum("ni,ni->n", np.abs(self.rotation[:, 2, :]), self.half)

    def near(self, point: Array, radius: float) -> Boxes:
        """Those that a ball touches."""
        close = self.distance(point) < radius
        return Boxes(self.centre[close], self.rotation[close], self.half[close])

    def above(self, height: float) -> Boxes:
        """Those that reach higher."""
        high = self.top() > height
        return Boxes(self.centre[high], self.rotation[high], self.half[high])


@dataclass(frozen=True)
class SceneState:
    """All that the expert looks at, in the world frame; quaternions are [x, y, z, w]."""

    eef_position: Array  # [3], the grip site, between the fingertips
    eef_quaternion: Array  # [4]
    fingers: Array  # [2], the finger joints: about (0.04, -0.04) open, (0, 0) closed
    finger_speeds: Array  # [2], m/s
    bowl_position: Array  # [3], the target's
    bowl_quaternion: Array  # [4]
    plate_position: Array  # [3]
    obstacles: Boxes

    @property
    def opening(self) -> float:
        """Distance between the pads."""
        return float(self.fingers[0] - self.fingers[1])

    @property
    def grip(self) -> float:
        """From 0, while the fingers are closing, to 1, when they are still."""
        closing = float(self.finger_speeds[1] - self.finger_speeds[0])
        return float(np.interp(closing, CLOSING_SPEED, (1.0, 0.0)))


@dataclass(frozen=True)
class Grasp:
    """Where the grip site has to be, and how the hand is turned, for the fingers to close on the rim."""

    position: Array  # [3]
    yaw: float  # rad


def expert_action(state: SceneState) -> NDArray[np.float32]:
    """The action [7] in [-1, 1] (dx dy dz droll dpitch dyaw gripper), from this state alone."""
    if is_placed(state):
        return _action(np.array([0.0, 0.0, _rise(state)]), _upright(state), OPEN)
    if is_held(state):
        return _action(_carry(state) * state.grip, _upright(state), CLOSE)
    grasp = choose_grasp(state)
    if is_at(state, grasp):
        free = min(state.opening / WIDE_OPEN, 1.0) ** 2  # closing fingers hold the hand where the bowl is
        return _action(free * (grasp.position - state.eef_position), free * _turn(state, grasp.yaw), CLOSE)
    return _action(_approach(state, grasp), _turn(state, grasp.yaw), OPEN)


def is_placed(state: SceneState) -> bool:
    """Whether the bowl stands on the plate, or is so low over it that it may be let go."""
    up = _axes(state.bowl_quaternion)[:, 2]
    lowest = state.bowl_position[2] - FOOT_RADIUS * float(np.hypot(up[0], up[1]))
    offset = np.linalg.norm((state.bowl_position - state.plate_position)[:2])
    return bool(offset < PLACED_OFFSET and lowest < state.plate_position[2] + PLACED_HEIGHT)


def is_held(state: SceneState) -> bool:
    """Whether the fingers are closed on the rim, anywhere around it."""
    local = _axes(state.bowl_quaternion).T @ (state.eef_position - state.bowl_position)
    across = abs(np.hypot(local[0], local[1]) - GRASP_RADIUS)
    below = RIM_HEIGHT - local[2]
    covered = across < HELD_TOLERANCE and HELD_DEPTH[0] < below < HELD_DEPTH[1]
    return bool(EMPTY_OPENING < state.opening < HELD_OPENING and covered)


def is_at(state: SceneState, grasp: Grasp) -> bool:
    """Whether the fingers may close; the more they have closed, the more may be missing."""
    closed = np.clip(1.0 - state.opening / WIDE_OPEN, 0.0, 1.0)
    error = (grasp.position - state.eef_position) * (1.0, 1.0, DEPTH_WEIGHT)
    return bool(np.linalg.norm(error) < GRASP_TOLERANCE + GRASP_SLACK * closed)


def choose_grasp(state: SceneState) -> Grasp:
    """The cheapest rim point: see the module's notes."""
    positions, yaws, costs = _candidates(state)
    near = state.obstacles.near(state.bowl_position, GRASP_RADIUS + HAND_LENGTH + HAND_BOTTOM)
    near = near.above(float(positions[:, 2].min()) - FINGER_TIP - CLEARANCE)
    best, lowest = 0, np.inf
    for i in np.argsort(costs):
        if costs[i] >= lowest:
            break
        cost = costs[i] + CLEARANCE_COST * max(CLEARANCE - _clearance(near, positions[i], yaws[i]), 0.0)
        if cost < lowest:
            best, lowest = int(i), cost
    return Grasp(positions[best], float(yaws[best]))


def _candidates(state: SceneState) -> tuple[Array, Array, Array]:
    """Grasps around the bowl, deep and shallow: positions [c, 3], yaws [c] and their costs [c] without obstacles."""
    up = _axes(state.bowl_quaternion)[:, 2]
    angle = np.tile(np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS), len(GRASPS))
    height, radius, shallow = np.repeat(np.array(GRASPS), DIRECTIONS, axis=0).T[..., None]  # [c, 1] each
    side = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)  # [c, 3]
    out = _unit(side - (side @ up)[:, None] * up)
    normal = np.cos(WALL_SLOPE) * out - np.sin(WALL_SLOPE) * up  # of the wall's outside
    yaw = _half_turn(np.arctan2(normal[:, 1], normal[:, 0]) - np.pi / 2)
    position = state.bowl_position + height * up + radius * out
    rim = out[:, 2] * GRASP_RADIUS  # the height of the rim point, but for a constant
    cost = (
        shallow[:, 0]
        + HEIGHT_COST * (rim.max() - rim)
        + TURN_COST * np.abs(yaw)
        + REACH_COST * (_overreach(position) + _overreach(state.plate_position + position - state.bowl_position))
    )
    return position, yaw, cost


def _overreach(positions: Array) -> Array:
    """[n], m that positions [n, 3] are beyond the comfortable reach."""
    return np.maximum(np.linalg.norm((positions - BASE_POSITION)[:, :2], axis=1) - COMFORTABLE_REACH, 0.0)


def _clearance(obstacles: Boxes, position: Array, yaw: float) -> float:
    """The distance between the obstacles and the open gripper, pointing down with its grip site at `position`."""
    if not len(obstacles.half):
        return np.inf
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return float(obstacles.distance(position + _gripper_points() @ turn).min())


def _gripper_points() -> Array:
    """[p, 3], points on what the closing fingers sweep and on the lower part of the hand (x across, y along, z up)."""
    fingers = [
        (x, end * y, z)
        for end in (-1.0, 1.0)
        for x in (-FINGER_WIDTH, FINGER_WIDTH)
        for y in np.linspace(FINGER_CLOSED, FINGER_FAR, FINGER_POINTS)
        for z in (-FINGER_TIP, HAND_BOTTOM / 2)
    ]
    hand = [
        (x, y, z)
        for x in (-HAND_WIDTH, HAND_WIDTH)
        for y in np.linspace(-HAND_LENGTH, HAND_LENGTH, HAND_POINTS)
        for z in (HAND_BOTTOM, HAND_TOP)
    ]
    return np.array(fingers + hand)


def _approach(state: SceneState, grasp: Grasp) -> Array:
    """The displacement [3] towards the grasp: over it first, then down."""
    error = grasp.position - state.eef_position
    height = (
        APPROACH_SLOPE * max(float(np.hypot(error[0], error[1])) - APPROACH_SLACK, 0.0)
        + TURN_SLOPE * max(abs(float(_turn(state, grasp.yaw)[2])) - TURN_SLACK, 0.0)
        + OPEN_SLOPE * max(WIDE_OPEN - GRASP_TOLERANCE - state.opening, 0.0)
    )
    error[2] += min(height, HOVER)
    error[:2] *= _gate(error[2])
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
    if not len(obstacles.half):
        return -np.inf
    level = np.broadcast_to(state.bowl_position, obstacles.centre.shape).copy()
    level[:, 2] = obstacles.centre[:, 2]
    distance = np.diagonal(obstacles.distance(level))
    beyond = np.maximum(distance - BOWL_RADIUS - OBSTACLE_MARGIN, 0.0)
    return float((obstacles.top() + OBSTACLE_MARGIN - OBSTACLE_SLOPE * beyond).max())


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
    action = np.empty(ACTION_DIM)
    action[:2] = _shorten(POSITION_GAIN * displacement[:2] / POSITION_SCALE, 1.0)
    action[2] = np.clip(POSITION_GAIN * displacement[2] / POSITION_SCALE, -1.0, 1.0)
    action[3:6] = _shorten(ROTATION_GAIN * rotation / ROTATION_SCALE, TURN_LIMIT)
    action[6] = gripper
    return action.astype(np.float32)


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


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _half_turn(angle: Array) -> Array:
    """The same line's angle in [-pi/2, pi/2)."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


# --- from the simulator -------------------------------------------------------------------------------

TARGET = "akita_black_bowl_1"
NOT_OBSTACLES = (TARGET, "plate_1", "robot0", "gripper0", "mount0", "table", "world")
BOX = 6  # mujoco.mjtGeom.mjGEOM_BOX


def scene_state(raw: Mapping[str, Array], sim: MjSim) -> SceneState:
    """The scene from robosuite's raw observation and its simulation (for the obstacles)."""
    return SceneState(
        eef_position=np.array(raw["robot0_eef_pos"]),
        eef_quaternion=np.array(raw["robot0_eef_quat"]),
        fingers=np.array(raw["robot0_gripper_qpos"]),
        finger_speeds=np.array(raw["robot0_gripper_qvel"]),
        bowl_position=np.array(raw[f"{TARGET}_pos"]),
        bowl_quaternion=np.array(raw[f"{TARGET}_quat"]),
        plate_position=np.array(raw["plate_1_pos"]),
        obstacles=_obstacles(sim),
    )


def _obstacles(sim: MjSim) -> Boxes:
    model, data = sim.model, sim.data
    relevant = np.array([not name.startswith(NOT_OBSTACLES) for name in model.body_names])
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    chosen = relevant[model.geom_bodyid] & collides & (model.geom_type == BOX)
    return Boxes(
        np.array(data.geom_xpos[chosen]),
        np.array(data.geom_xmat[chosen]).reshape(-1, 3, 3),
        np.array(model.geom_size[chosen]),
    )
