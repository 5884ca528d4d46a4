"""The draft at the robot's side: the exported component `propose`, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ControlConfig, Precision
from rsd_trt.errors import UserError, missing_extra, reason
from rsd_trt.manifest import MANIFEST, Manifest, intact
from rsd_trt.records import read_record
from rsd_trt.runtime.observation import Observation


class OrtDraft:
    """The exported component `propose` in ONNX Runtime, on NumPy arrays."""

    def __init__(self, file: Path, control: ControlConfig, providers: Sequence[str], threads: int) -> None:
        """control: what its observations are. threads: 0 leaves it to ONNX Runtime.

        Raises:
            UserError: ONNX Runtime is not installed, or cannot run it.
        """
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "edge") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work wants the cores
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, list(providers), enable_fallback=False)
        except Exception as error:  # the library's exceptions share no base class
            raise UserError(f"onnxruntime {onnxruntime.__version__} cannot run {file}: {reason(error)}") from None
        self._control = control
        self._inputs = {port.name for port in self._session.get_inputs()}
        self._outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, observation: Observation, rows: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        """The outputs of a check, each with a batch of one.

        Raises:
            UserError: the observation is not what the draft takes.
        """
        observation.check(self._control, "state" in self._inputs)
        given: dict[str, NDArray[np.generic]] = {"frames": observation.images, "instruction": rows}
        if "state" in self._inputs:
            assert observation.proprio is not None
            given["state"] = observation.proprio.astype(np.float32)
        values = self._session.run(self._outputs, {name: given[name][None] for name in self._inputs})
        return dict(zip(self._outputs, values, strict=True))


def exported_draft(engines: Path, bundle: str, fingerprint: str, precision: Precision) -> Path:
    """The ONNX graph of `propose` in a folder of exports, if it is the one that the server's policy was made with.

    Raises:
        UserError: there is none, or it is another.
    """
    folder, remedy = engines / bundle, f"rsd-trt export BUNDLE --target onnx --precision {precision}"
    try:
        manifest = read_record(Manifest, folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no exports", f"Make them, and copy the folder here: {remedy}") from None
    artefact = manifest.find("propose", precision, "1", "onnx")
    if artefact is None:
        raise UserError(f"{folder} has no propose {precision} batch 1 (onnx)", f"Make it: {remedy}")
    ok, why = intact(artefact, folder, fingerprint)
    if not ok:
        raise UserError(why, f"Make it anew, and copy the folder here: {remedy}")
    return folder / artefact.files[0].name
