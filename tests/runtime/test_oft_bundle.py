"""A bundle with OpenVLA-OFT's head in every place where others have tokens: the loop, exports, verify, profile."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import Result
from command import rsd_trt
from made_without import made_without
from msgspec import structs
from timm_double import TimmDouble

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.config import MODES, Mode, Quantiles
from rsd_trt.errors import UserError
from rsd_trt.eval.verify import oracle
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.presets import initialise
from rsd_trt.runtime import graph_backbone
from rsd_trt.runtime.backends import Encoder, Launcher, assemble
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.session import Launch
from rsd_trt.runtime.speculate import RandomAcceptance

CPU = torch.device("cpu")
WORDS = ("pick up the bowl", "put the bowl on the plate", "lift")
Observe = Callable[..., Observation]


@pytest.fixture(scope="module")
def oft(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle with OpenVLA-OFT's head and a draft with eyes of its own, under their conventions."""
    made = initialise(tmp_path_factory.mktemp("bundles") / "oft", "tiny", seed=0, head="oft-l1")
    control = structs.replace(
        made.config.control,
        action_quantiles=Quantiles((-0.5,) * 6 + (0.0,), (0.8,) * 6 + (1.0,), (True,) * 6 + (False,)),
    )
    wide = structs.replace(
        made.config.rsd, tolerance=(2.0,) * 6, n_action_steps=2
    )  # untrained drafts pass now and then
    return copy_with(made, structs.replace(made.config, control=control, rsd=wide), made.path.parent / "wide")


def with_rule(bundle: Bundle, **changes: object) -> Bundle:
    config = structs.replace(bundle.config, rsd=structs.replace(bundle.config.rsd, **changes))
    return dataclasses.replace(bundle, config=config)


@pytest.mark.parametrize("rule", ["first", "actions", "path", "likelihood"])
@pytest.mark.parametrize("mode", MODES)
def test_it_acts_in_every_mode_by_every_rule_but_tokens(oft: Bundle, observe: Observe, mode: Mode, rule: str) -> None:
    bundle = with_rule(oft, rule=rule, threshold=-3.0)
    control = RandomAcceptance(0.5, 0) if mode == "random" else None
    policy = Policy.load(bundle, mode, environments=2, rule=control)
    queries = []
    for step in range(4):
        seen = [observe(bundle.config.control, 10 * step + env, WORDS[env]) for env in range(2)]
        queries += policy.act_batch(seen, [0, 1])
    assert not any(query.fault for query in queries)
    assert all(query.actions.shape[1] == 7 and len(query.actions) for query in queries)
    if mode in ("rsd", "random"):
        assert {query.route for query in queries} & {"accepted", "partial"}
    if rule == "likelihood" and mode == "rsd":
        assert any(query.score is not None for query in queries)


def test_the_codec_says_what_the_chunks_tokens_are(oft: Bundle) -> None:
    """Encoded in the policy's own units; of what the codec can say itself, it is the token that was decoded."""
    codec, transform, dims = oft.codec(), oft.transform(), oft.config.dims
    tokens = torch.randint(0, dims.K, (3, dims.T, dims.D, dims.L), generator=torch.Generator().manual_seed(0))
    decoded = codec.decode(tokens)
    back = transform.inverse(transform(decoded))
    torch.testing.assert_close(back[..., :6], decoded[..., :6], rtol=0, atol=1e-5)
    torch.testing.assert_close(back[..., 6], (decoded[..., 6] > 0.5).float())
    torch.testing.assert_close(
        torch.from_numpy(Encoder(oft)(transform(decoded).numpy())), codec.encode(transform.inverse(transform(decoded)))
    )


def test_the_rule_tokens_is_refused_with_the_reason(oft: Bundle, tmp_path: Path) -> None:
    config = json.loads((oft.path / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({**config, "rsd": {**config["rsd"], "rule": "tokens"}}))
    with pytest.raises(UserError, match=r"rsd.rule tokens compares .* head.kind oft-l1 gives actions without tokens"):
        Bundle.open(broken)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("backbone", {"action_tokens": 8}, "backbone.action_tokens 8 must be 56, one for each number of a chunk"),
        ("draft", {"kind": "hidden"}, "draft.kind hidden reads one hidden state of a query, head.kind oft-l1 makes 56"),
        ("head", {"kind": "rfsq"}, "backbone.action_tokens 56: head.kind rfsq reads one hidden state"),
    ],
)
def test_what_does_not_go_with_the_head(
    oft: Bundle, part: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = json.loads((oft.path / "config.json").read_text())
    kept = {} if part == "draft" else config[part]
    (tmp_path / "config.json").write_text(json.dumps({**config, part: {**kept, **changes}}))
    with pytest.raises(UserError, match=message):
        Bundle.open(tmp_path)


def test_without_draft_and_codec_it_acts_in_open_loop(oft: Bundle, observe: Observe, tmp_path: Path) -> None:
    bundle = Bundle.open(made_without(copy_with(oft, oft.config, tmp_path / "alone").path, "draft", "codec"))
    assert bundle.components == ("head", "predict")
    policy = Policy.load(bundle, "baseline", n_action_steps=8)
    assert policy.act(observe(bundle.config.control)).shape == (8, 7)
    with pytest.raises(UserError, match="has no draft"):
        Policy.load(bundle, "rsd")


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_act_as_the_eager_backbone(
    oft: Bundle, observe: Observe, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths in a batch that is padded to a power of two."""

    def capture(launch: Launch, device: torch.device, pool: object = None) -> SimpleNamespace:
        launch()
        return SimpleNamespace(replay=lambda: torch.inference_mode()(launch)())

    monkeypatch.setattr(graph_backbone, "capture", capture)
    monkeypatch.setattr(graph_backbone, "pinned", lambda shape, dtype: torch.zeros(tuple(shape), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", threading.get_ident)
    seen = [observe(oft.config.control, env, WORDS[env]) for env in range(batch)]
    launcher = Launcher(oft, "torch", CPU)
    eager = assemble(launcher, "dynamic", oft.backbone()).full(seen)
    fast = assemble(launcher, "dynamic", FusedBackbone(oft.backbone())).full(seen)
    assert eager.tokens is fast.tokens is None
    np.testing.assert_allclose(fast.actions, eager.actions, atol=1e-5)
    alone = assemble(launcher, "1", oft.backbone())
    np.testing.assert_allclose(np.concatenate([alone.full([x]).actions for x in seen]), eager.actions, atol=1e-5)


def run(*arguments: object) -> Result:
    return rsd_trt(*arguments)


@pytest.mark.slow
def test_it_is_exported_verified_and_timed(oft: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(made_without(copy_with(oft, oft.config, tmp_path / "alone").path, "draft", "codec"))
    engines = ("--engines", tmp_path / "engines")
    exported = run("export", bundle.path, "--target", "onnx", "-o", engines[1], "--json")
    assert exported.exit_code == 0, exported.output
    assert {row["artefact"].split()[0] for row in json.loads(exported.stdout)} == {"head", "predict"}
    verified = run("verify", bundle.path, "--backend", "torch,ort", *engines, "--device", "cpu")
    assert verified.exit_code == 0, verified.output
    some = ("--out", tmp_path / "results", "-n", 2, "--warm-up", 1, "--device", "cpu", "--json")
    profiled = run("profile", bundle.path, "--backend", "torch,ort", *engines, *some)
    assert profiled.exit_code == 0, profiled.output


@pytest.mark.slow
def test_the_backbone_is_verified_and_timed(oft: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "timm_tower", TimmDouble)
    backbone = run("verify-backbone", oft.path, "--backbone", "eager", "--device", "cpu", "-n", "32", "--json")
    assert backbone.exit_code == 0, backbone.output
    rows = {(row["component"], row["reference"]) for row in json.loads(backbone.stdout)["rows"]}
    assert {
        ("preprocessing", "PIL"),
        ("language", "transformers fp32"),
        ("backbone", "timm + transformers fp32"),
    } <= rows
    some = ("--out", tmp_path / "results", "-n", 2, "--warm-up", 1, "--device", "cpu", "--json")
    query = run("profile-query", oft.path, "--images", "2", *some)
    assert query.exit_code == 0, query.output
    assert "predict" in {row["what"] for row in json.loads(query.stdout)["rows"]}


def test_info_says_how_it_is_driven(oft: Bundle) -> None:
    shown = " ".join(run("info", oft.path).stdout.split())
    for told in ("T*A=56", "backbone.attention 'bidirectional'", "head.kind 'oft-l1'", "control.jpeg_quality 95"):
        assert told in shown.replace("│ ", "")
