"""OpenVLA's folders as bundles: the same hidden state as an independent assembly, and nothing wrong gets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import original
import pytest
import safetensors.torch
import torch
from click.testing import Result
from command import rsd_trt
from openvla_folder import (
    HIDDEN,
    IMAGE,
    STATISTICS,
    VOCAB,
    ActionHead,
    OpenVLA,
    ProprioProjector,
    seeded,
    write_beside,
    write_folder,
)
from PIL import Image
from torch import Tensor, nn

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.cli.info import describe
from rsd_trt.config import PROPRIO_DIM, ControlConfig, HiddenDraftConfig, Preset, protocol_name
from rsd_trt.errors import UserError
from rsd_trt.eval.verify.oracle import tensorflow_resample
from rsd_trt.importers.pack import PackRequest, pack
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.pixels import through_jpeg
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import Preprocessor

Change = Callable[[Path], object]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
PROPRIO_FILE = "proprio_projector--150000_checkpoint.pt"
HEAD_FILE = "action_head--150000_checkpoint.pt"
DATA = "libero_spatial_no_noops"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of products this small wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> OpenVLA:
    return OpenVLA()


@pytest.fixture(scope="module")
def proprio_projector(randomise: Callable[..., None]) -> ProprioProjector:
    module = ProprioProjector()
    randomise(module)
    return module


@pytest.fixture(scope="module")
def folder(model: OpenVLA, proprio_projector: ProprioProjector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVLA-OFT's folder: OpenVLA's and two files more. Read only: a test that writes takes `copied`."""
    path = write_folder(tmp_path_factory.mktemp("hf") / "openvla", model)
    write_beside(path, "proprio_projector", proprio_projector)
    write_beside(path, "action_head", seeded(ActionHead(), 1))
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "hf"))


def packed(folder: Path, out: Path, preset: Preset = "rvq", **more: object) -> Bundle:
    statistics = None if preset == "rvq" else DATA
    pack(PackRequest(str(folder), preset, out, **{"statistics": statistics, **more}))  # type: ignore[arg-type]
    return Bundle.open(out)


def refused(folder: Path, out: Path, preset: Preset = "rvq", **more: object) -> str:
    """The message of a refusal, which leaves nothing behind."""
    out.parent.mkdir(exist_ok=True)
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        packed(folder, out, preset, **more)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def observation(bundle: Bundle) -> Observation:
    random = np.random.default_rng(0)
    side = bundle.config.control.camera_size
    return Observation(
        random.integers(0, 256, (len(bundle.config.control.cameras), side, side, 3), dtype=np.uint8),
        random.uniform(-0.6, 0.6, PROPRIO_DIM).astype(np.float32),
        "Pick up the Bowl",
    )


def processor(image: np.ndarray, preset: Preset) -> Tensor:
    """OpenVLA's image processor: 6 channels, by the saved numbers. Before it OpenVLA's evaluations bring images to
    size; the original experiment's do not, and PIL does."""
    if preset == "rvq":
        resized = np.asarray(Image.fromarray(image).resize((IMAGE, IMAGE), Image.Resampling.BICUBIC)).copy()
    else:
        resized = tensorflow_resample(through_jpeg(np.ascontiguousarray(image[::-1, ::-1]), 95), IMAGE, 0.9)
    x = torch.from_numpy(resized).permute(2, 0, 1) / 255
    mean = torch.tensor([0.484375, 0.455078125, 0.40625]).view(3, 1, 1)
    std = torch.tensor([0.228515625, 0.2236328125, 0.224609375]).view(3, 1, 1)
    return torch.cat([(x - mean) / std, (x - 0.5) / 0.5])[None]


@pytest.mark.parametrize(
    ("preset", "prompt", "images"),
    [
        ("openvla", "In: What action should the robot take to pick up the bowl?\nOut:", 1),
        ("openvla-oft", "In: What action should the robot take to pick up the bowl?\nOut:", 2),
        ("rvq", "Pick up the Bowl", 1),
    ],
)
@torch.no_grad()
def test_the_hidden_state_of_an_observation_equals_an_independent_assembly(
    preset: Preset,
    prompt: str,
    images: int,
    model: OpenVLA,
    proprio_projector: ProprioProjector,
    folder: Path,
    tmp_path: Path,
) -> None:
    bundle = packed(folder, tmp_path / "bundle", preset)
    seen = observation(bundle)
    assert len(seen.images) == images
    control, cpu = bundle.config.control, torch.device("cpu")
    inputs = Preprocessor(control, bundle.config.backbone, bundle.tokenizer(), cpu)([seen])
    hidden = bundle.backbone()(inputs)

    ids = bundle.tokenizer().encode(prompt).ids + ([] if preset == "rvq" else [29871])
    proprio = None
    if preset == "openvla-oft":
        normalised = np.clip(np.where([True] * 6 + [False] * 2, seen.proprio / 0.5, seen.proprio), -1, 1)
        proprio = proprio_projector(torch.from_numpy(normalised.astype(np.float32)))[None, None]
    pixels = [processor(image, preset) for image in seen.images]
    expected = model.hidden(pixels, torch.tensor([ids]), proprio, action_tokens=56 if preset == "openvla-oft" else 0)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(hidden, expected, rtol=0, atol=5e-3)  # one pixel may round to the next level


@pytest.mark.parametrize(("images", "shards"), [(1, 1), (1, 2), (2, 5)])
@torch.no_grad()
def test_the_hidden_state_of_pixels_is_exact(images: int, shards: int, model: OpenVLA, tmp_path: Path) -> None:
    from rsd_trt.models.backbone import BackboneInputs

    backbone = packed(write_folder(tmp_path / "hf", model, shards), tmp_path / "bundle").backbone()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, images, 2, 3, IMAGE, IMAGE, generator=generator)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=generator)
    hidden = backbone(BackboneInputs(pixels, tokens, torch.tensor([9, 9])))
    expected = model.hidden([pixels[:, i].flatten(1, 2) for i in range(images)], tokens)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_what_the_presets_set(folder: Path, tmp_path: Path) -> None:
    quantiles = STATISTICS[DATA]["action"]
    for preset in ("openvla", "openvla-oft"):
        bundle = packed(folder, tmp_path / preset, preset)  # type: ignore[arg-type]
        control = bundle.config.control
        assert (protocol_name(control), control.settle_steps) == ("oft", 10)
        assert (control.rotate_images, control.gripper, control.resize) == (True, "openvla", "resize-naive")
        assert (control.suffix_token, control.lowercase, control.center_crop) == (29871, True, 0.9)
        assert (control.rotation, control.statistics) == ("robosuite", DATA)
        assert control.action_quantiles is not None
        assert list(control.action_quantiles.q99) == quantiles["q99"]
        assert list(control.action_quantiles.mask) == [True] * 6 + [False]
        assert bundle.config.backbone.proprio == (preset == "openvla-oft") == (control.proprio_quantiles is not None)
        assert len(control.cameras) == 1 + bundle.config.backbone.proprio
        assert (control.jpeg_quality, control.resampling) == (95, "lanczos3")
        both_sides = preset == "openvla-oft"
        assert bundle.config.backbone.attention == ("bidirectional" if both_sides else "causal")
        assert (bundle.config.backbone.action_tokens, bundle.config.rsd.n_action_steps) == (
            (56, 8) if both_sides else (0, 4)
        )
    rvq = packed(folder, tmp_path / "rvq").config
    assert (rvq.control.prompt, rvq.control.lowercase, rvq.control.suffix_token) == ("{instruction}", False, None)
    assert (rvq.control.rotate_images, rvq.control.gripper, rvq.control.action_quantiles) == (False, "env", None)
    assert protocol_name(rvq.control) == "original"
    assert rvq.backbone.towers[0].mean == (0.484375, 0.455078125, 0.40625)  # the saved ones, not 0.485, 0.456, 0.406
    assert isinstance(rvq.draft, HiddenDraftConfig)
    assert rvq.trained


@pytest.mark.parametrize("head", [original.RFSQHead, original.ConditionedRFSQHead, original.RFSQClassificationHead])
def test_a_whole_policy_runs(head: type[nn.Module], folder: Path, tmp_path: Path) -> None:
    modules = {"draft": original.RFSQDraftModelWithProjection(), "head": head(), "codec": original.ActionRFSQAE(True)}
    bundle = packed(folder, tmp_path / "bundle", chunk=original.T, **checkpoints(tmp_path, modules))
    loaded = {"draft": bundle.draft(), "head": bundle.head(), "codec": bundle.codec()}
    for part, module in modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(loaded[part].state_dict()[key], value)
    policy = Policy.load(bundle, "rsd")
    assert policy.act(observation(bundle)).shape[1] == original.A


def checkpoints(folder: Path, modules: dict[str, nn.Module]) -> dict[str, Path]:
    files = {}
    for part, module in modules.items():
        files[part] = folder / f"{part}.pt"
        torch.save({"model_state_dict": module.state_dict(), "config": {"use_layernorm": True}}, files[part])
    return files


def test_without_draft_head_and_codec_the_rest_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    bundle = packed(folder, tmp_path / "bundle")
    assert {file.name for file in bundle.path.iterdir()} == {"config.json", "tokenizer.json"}
    for part in ("draft", "head", "codec"):
        with pytest.raises(UserError, match=f"the bundle has no {part}"):
            getattr(bundle, part)()
    described = describe(bundle, tmp_path / "engines")
    assert described["parts"]["draft"] is None  # type: ignore[index]
    assert described["parts"]["backbone"]["folder"] == str(folder)  # type: ignore[index]


def test_weights_are_referenced_unless_copied(folder: Path, tmp_path: Path) -> None:
    referenced = packed(folder, tmp_path / "a", "openvla-oft")
    assert not set(SHARDS) & {file.name for file in referenced.path.iterdir()}
    copy = packed(folder, tmp_path / "b", "openvla-oft", copy=True)
    for shard in SHARDS:
        assert (copy.path / shard).read_bytes() == (folder / shard).read_bytes()
    moved = copy_with(copy, copy.config, tmp_path / "c")
    shutil.rmtree(copy.path)
    loaded = moved.backbone().state_dict()
    for key, value in referenced.backbone().state_dict().items():
        assert torch.equal(loaded[key], value)


def test_a_link_in_place_of_a_copied_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    bundle = packed(folder, tmp_path / "a", copy=True)
    file = bundle.path / SHARDS[0]
    file.symlink_to(file.rename(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=f"{SHARDS[0]} is a symbolic link, which may lead anywhere"):
        bundle.backbone()


def test_a_changed_shard_is_refused_and_the_fingerprint_covers_it(copied: Path, tmp_path: Path) -> None:
    bundle = packed(copied, tmp_path / "a")
    state = safetensors.torch.load_file(copied / SHARDS[1])
    state = {key: value + 1 for key, value in state.items()}
    safetensors.torch.save_file(state, copied / SHARDS[1], {"format": "pt"})
    with pytest.raises(UserError, match=f"{SHARDS[1]} has changed: sha256 of its samples"):
        Bundle.open(bundle.path).backbone()
    assert packed(copied, tmp_path / "b" / "a").fingerprint != bundle.fingerprint


def test_a_hub_cache_consists_of_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    packed(snapshot, tmp_path / "bundle").backbone()


def test_a_hub_id_is_looked_up_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, [pattern for pattern in allow_patterns if pattern.endswith(".py")]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert packed(Path("openvla/openvla-7b"), tmp_path / "bundle").weights_folder == folder
    assert asked == [("openvla/openvla-7b", [])]


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service not known\nAn error happened")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    message = refused(Path("openvla/openvla-7b"), tmp_path / "bundle")
    assert message.startswith("openvla/openvla-7b is no folder, is not whole in the Hugging Face cache, and cannot be")
    assert message.endswith("Fetch it where there is a network (hf download openvla/openvla-7b), and give its folder")
    assert "is no folder" in refused(tmp_path / "nothing", tmp_path / "bundle")


def edit(name: str, **changes: object) -> Change:
    """Changes keys of a JSON file; `a__b` is b in a."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *outer, last = path.split("__")
            section = data
            for key in outer:
                section = section[key]
            section[last] = value
        (folder / name).write_text(json.dumps(data))

    return change


def edit_tensor(key: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    """Changes a tensor, or takes it out."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = folder / index["weight_map"].get(key, SHARDS[0])
        state = safetensors.torch.load_file(file)
        new = change(state.pop(key, torch.zeros(2)).clone())
        index["weight_map"].pop(key, None)
        if new is not None:
            state[key] = new
            index["weight_map"][key] = file.name
        safetensors.torch.save_file(state, file, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def fill_nan(value: Tensor) -> Tensor:
    value.flatten()[3] = torch.nan
    return value


def aloha_head() -> dict[str, Tensor]:
    state = seeded(ActionHead(), 1).state_dict()
    return {**state, "model.fc2.weight": torch.zeros(14, HIDDEN), "model.fc2.bias": torch.zeros(14)}


def rename_tensors(change: Callable[[str], str]) -> Change:
    """Gives every tensor another name."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {change(key): name for key, name in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
        for shard in SHARDS:
            state = safetensors.torch.load_file(folder / shard)
            renamed = {change(key): value for key, value in state.items()}
            safetensors.torch.save_file(renamed, folder / shard, {"format": "pt"})

    return apply


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LAYER = "language_model.model.layers.1"
DAMAGE: dict[str, tuple[Change, str]] = {
    "another model": (
        edit("config.json", model_type="llava", architectures=["LlavaForConditionalGeneration"]),
        "config.json is of model_type 'llava', architectures ['LlavaForConditionalGeneration']: only 'openvla'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: the top level is no object"),
    "another language model": (edit("config.json", text_config__model_type="phi"), "model_type is 'phi', not 'llama'"),
    "grouped queries": (
        edit("config.json", text_config__num_key_value_heads=2),
        "num_key_value_heads is 2, not 4",
    ),
    "stretched positions": (
        edit("config.json", text_config__rope_scaling={"type": "linear", "factor": 2}),
        "rope_scaling is {'factor': 2, 'type': 'linear'}, not None",
    ),
    "another tower": (
        edit("config.json", timm_model_ids=["vit_large_patch14_clip_336.openai"], image_sizes=[336]),
        "the vision towers are vit_large_patch14_clip_336, not vit_large_patch14_reg4_dinov2, vit_so400m_",
    ),
    "a tower without a printable name": (
        edit("config.json", timm_model_ids=["a\0b", "\x1b[2J"]),
        r"the vision towers are 'a\x00b', '\x1b[2J', not vit_large",
    ),
    "another activation": (
        edit("config.json", timm_override_act_layers=["quick_gelu", None]),
        "timm_override_act_layers ['quick_gelu', None]",
    ),
    "half precision": (
        edit("config.json", torch_dtype="float16"),
        "float32 are. Save the model in bfloat16",
    ),
    "two image sizes": (edit("config.json", image_sizes=[28, 42]), "the towers read images of [28, 42] pixels"),
    "resize-crop": (
        edit("preprocessor_config.json", image_resize_strategy="resize-crop"),
        "preprocessor_config.json: image_resize_strategy 'resize-crop' is not supported",
    ),
    "bilinear": (
        edit("preprocessor_config.json", interpolations=["bilinear", "bicubic"]),
        "interpolations ['bilinear', 'bicubic'] are not supported",
    ),
    "no preprocessor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: the key image_resize_strategy is missing",
    ),
    "vocabulary": (
        edit("config.json", text_config__vocab_size=32000),
        f"text_config.vocab_size is 32000, the weights have {VOCAB} embeddings ({SHARDS[0]})",
    ),
    "vocabulary of the weights": (
        edit_tensor("language_model.model.embed_tokens.weight", lambda x: x[:100]),
        f"text_config.vocab_size is {VOCAB}, the weights have 100 embeddings",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "missing key": (
        edit_tensor(f"{LAYER}.mlp.up_proj.weight", lambda _: None),
        f"does not fit the configuration; missing: {LAYER}.mlp.up_proj.weight",
    ),
    "unexpected key": (
        edit_tensor("language_model.extra", lambda x: x),
        f"unexpected: language_model.extra ({SHARDS[0]})",
    ),
    "mis-shaped key": (
        edit_tensor(f"{LAYER}.self_attn.k_proj.weight", lambda x: x[:8].contiguous()),
        f"of another shape: {LAYER}.self_attn.k_proj.weight ({SHARDS[0]}) is [8, {HIDDEN}], not [{HIDDEN}, {HIDDEN}]",
    ),
    "NaN": (
        edit_tensor(f"{LAYER}.mlp.up_proj.weight", fill_nan),
        f"{SHARDS[0]}: {LAYER}.mlp.up_proj.weight has 1 of {48 * HIDDEN} numbers that are NaN or infinite",
    ),
    "NaN, proprio": (
        lambda f: torch.save({"fc2.weight": torch.full((2, 2), torch.nan)}, f / PROPRIO_FILE),
        f"{PROPRIO_FILE}: fc2.weight has 4 of 4 numbers",
    ),
    "no proprio": (lambda f: (f / PROPRIO_FILE).unlink(), "needs proprio_projector--*_checkpoint.pt, DIR has none"),
    "two proprio": (
        lambda f: shutil.copy(f / PROPRIO_FILE, f / "proprio_projector--9_checkpoint.pt"),
        "proprio_projector--9_checkpoint.pt: keep one",
    ),
    "two heads": (
        lambda f: shutil.copy(f / HEAD_FILE, f / "action_head--9_checkpoint.pt"),
        "action_head--9_checkpoint.pt: keep one",
    ),
    "FiLM": (
        lambda f: (f / "vision_backbone--9_checkpoint.pt").touch(),
        "DIR was fine-tuned with FiLM: its vision tower lies apart (vision_backbone--9_checkpoint.pt)",
    ),
    "diffusion": (lambda f: (f / "noise_predictor--9_checkpoint.pt").touch(), "DIR has a diffusion head"),
    "LoRA's folder, which has no config.json": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "DIR holds LoRA adapters that are not merged",
    ),
    "LoRA's wrapper": (
        rename_tensors(lambda key: f"base_model.model.{key}"),
        "the weights hold LoRA adapters beside the layers (base_model.model.language_model.lm_head.weight). Merge",
    ),
    "LoRA's layers": (
        rename_tensors(lambda key: key.replace("q_proj.weight", "q_proj.base_layer.weight")),
        "the weights hold LoRA adapters beside the layers (language_model.model.layers.0.self_attn.q_proj.base_layer",
    ),
    "a wrapper's prefix": (
        rename_tensors(lambda key: f"module.{key}"),
        "its weights are not OpenVLA's, their keys begin with module. Save the model anew, as",
    ),
    "LoRA in the weights": (
        edit_tensor("language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight", lambda x: x),
        "the weights hold LoRA adapters beside the layers (language_model.model.layers.0.self_attn.q_proj.lora_A",
    ),
    "LoRA alone": (
        lambda f: ((f / INDEX).unlink(), (f / "lora_adapter").mkdir()),
        "DIR has LoRA adapters (lora_adapter) and no merged weights. Merge them",
    ),
    "diffusion, by the head": (
        lambda f: torch.save({"module.noise_predictor.mlp_resnet.fc1.weight": torch.zeros(2, 2)}, f / HEAD_FILE),
        f"{HEAD_FILE} is OpenVLA-OFT's diffusion head, which is not supported. Supported are OpenVLA-OFT's L1",
    ),
    "no head": (
        lambda f: (f / HEAD_FILE).unlink(),
        "needs action_head--*_checkpoint.pt, DIR has none. Give another head: --head",
    ),
    "ALOHA's head": (
        lambda f: torch.save(aloha_head(), f / HEAD_FILE),
        f"{HEAD_FILE}, model.fc2.weight, has 14 dimensions (ALOHA's two arms); 7 are supported: 7 of an action",
    ),
    "ALOHA's statistics": (
        edit("config.json", norm_stats={DATA: {"action": {"q01": [0.0] * 14, "q99": [1.0] * 14}}}),
        f"statistics of {DATA!r}, action has 14 dimensions (ALOHA's two arms); 7 are supported",
    ),
    "pointers": (
        lambda f: (f / SHARDS[0]).write_bytes(POINTER),
        f"{SHARDS[0]} is git-lfs's pointer to the file, and not the file. Fetch it: git lfs pull",
    ),
    "a pointer to the head": (lambda f: (f / HEAD_FILE).write_bytes(POINTER), f"{HEAD_FILE} is git-lfs's pointer"),
    "a pointer to the tokenizer": (
        lambda f: (f / "tokenizer.json").write_bytes(POINTER),
        "tokenizer.json is git-lfs's pointer",
    ),
    "truncated shard": (
        lambda f: (f / SHARDS[1]).write_bytes((f / SHARDS[1]).read_bytes()[:-50]),
        f"{SHARDS[1]} cannot be read as safetensors",
    ),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing: DIR is incomplete"),
    "no weights": (
        lambda f: (f / INDEX).unlink(),
        f"has neither model.safetensors nor {INDEX}: one is needed. Save the model anew, as safetensors",
    ),
    "two kinds of weights": (
        lambda f: shutil.copy(f / SHARDS[0], f / "model.safetensors"),
        f"has both model.safetensors and {INDEX}",
    ),
    "an index that points out": (
        edit(INDEX, weight_map={"a": "../secret.safetensors"}),
        "names '../secret.safetensors', which is no model*.safetensors of its folder",
    ),
    "an index that is wrong": (
        edit(INDEX, weight_map={"a": SHARDS[0]}),
        "and the shards disagree about a, language_model.lm_head.weight",
    ),
    "no statistics": (edit("config.json", norm_stats=None), "DIR has no statistics to normalise by: no dataset_"),
    "other statistics": (edit("config.json", norm_stats={"bridge": {}}), f"has no statistics of {DATA!r}"),
    "no quantiles": (
        edit("config.json", norm_stats={DATA: {"action": {}}}),
        "quantiles (q01, q99) for 'libero_spatial_no_noops'. Put",
    ),
    "short quantiles": (
        edit("config.json", norm_stats={DATA: {kind: {"q01": [0.0], "q99": [1.0]} for kind in ("action", "proprio")}}),
        "control.action_quantiles has lists of [1] numbers, not 7",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_is_not_right_is_one_clear_line(
    change: Change, message: str, copied: Path, tmp_path: Path
) -> None:
    change(copied)
    statistics = None if "no statistics to" in message else DATA
    found = refused(copied, tmp_path / "bundle", "openvla-oft", statistics=statistics)
    assert message.replace("DIR", str(copied)) in found


def test_the_tokenizer_has_to_fit(copied: Path, tmp_path: Path) -> None:
    file = copied / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["word"] = VOCAB
    file.write_text(json.dumps(data))
    message = refused(copied, tmp_path / "bundle")
    assert message == f"{file} has the token {VOCAB}, the backbone has embeddings of 0 to {VOCAB - 1} only"
    data["model"]["vocab"].pop("word")
    data["post_processor"] = None
    file.write_text(json.dumps(data))
    assert "does not put <s> in front of the prompt" in refused(copied, tmp_path / "bundle")


def test_statistics_are_chosen_by_name(copied: Path, tmp_path: Path) -> None:
    message = refused(copied, tmp_path / "bundle", "openvla", statistics=None)
    assert message == (f"{copied} has statistics of 2 data sets: bridge_orig, {DATA}. Choose one: --statistics NAME")
    assert "did you mean 'bridge_orig'?" in refused(copied, tmp_path / "bundle", "openvla", statistics="bridge_ori")
    assert "leave out --statistics" in refused(copied, tmp_path / "bundle", "rvq", statistics=DATA)
    (copied / "dataset_statistics.json").write_text(json.dumps({"mine": STATISTICS[DATA]}))
    assert packed(copied, tmp_path / "bundle", "openvla", statistics=None).config.control.statistics == "mine"


def test_a_folder_of_transformers_5(copied: Path, tmp_path: Path) -> None:
    """It nests the image processor's file in the processor's."""
    expected = packed(copied, tmp_path / "a").config.backbone
    processor = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").unlink()
    (copied / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert packed(copied, tmp_path / "b").config.backbone == expected


def test_other_weights_in_the_projectors_file_are_listed(copied: Path, tmp_path: Path) -> None:
    state = ProprioProjector().state_dict()
    torch.save({"model_state_dict": state, "ema_state_dict": state}, copied / PROPRIO_FILE)
    made = pack(PackRequest(str(copied), "openvla-oft", tmp_path / "bundle", statistics=DATA))
    assert made.not_read == (f"{PROPRIO_FILE}: ema_state_dict",)


def test_merged_adapters_beside_the_weights_are_left_alone(copied: Path, tmp_path: Path) -> None:
    (copied / "lora_adapter").mkdir()
    (copied / "lora_adapter" / "adapter_config.json").write_text("{}")
    packed(copied, tmp_path / "bundle")


def test_an_oft_head_needs_its_preset(folder: Path, tmp_path: Path) -> None:
    message = refused(folder, tmp_path / "out" / "bundle", "openvla", head=folder / HEAD_FILE)
    assert message.endswith("the head was trained without one. Use: --preset openvla-oft")


def test_letterbox_is_recorded(copied: Path, tmp_path: Path) -> None:
    edit("preprocessor_config.json", image_resize_strategy="letterbox")(copied)
    assert packed(copied, tmp_path / "bundle").config.control.resize == "letterbox"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"draft": original.RFSQDraftModelWithProjection(hidden=24)},
            "draft.pt reads a hidden state of 24 numbers, the backbone of DIR gives 32",
        ),
        (
            {"head": original.RFSQHead(hidden=24)},
            "head.pt reads a hidden state of 24 numbers, the backbone of DIR gives 32",
        ),
        ({"codec": original.ActionRFSQAE(True, actions=6)}, "dims.A 6 must be 7: six of the arm, one gripper"),
        (
            {"draft": nn.ModuleDict({"input_projection": nn.Linear(HIDDEN, 16)})},
            "draft.pt is no draft: it has no ",
        ),
    ],
    ids=["draft", "head", "codec", "half a draft"],
)
def test_parts_that_do_not_fit(modules: dict[str, nn.Module], message: str, folder: Path, tmp_path: Path) -> None:
    files = checkpoints(tmp_path, {"codec": original.ActionRFSQAE(True), **modules})
    found = refused(folder, tmp_path / "out" / "bundle", chunk=original.T, **files)
    assert message.replace("DIR", str(folder)) in found


def test_keys_of_a_checkpoint_are_listed(folder: Path, tmp_path: Path) -> None:
    head = original.RFSQHead()
    head.more = nn.Linear(1, 1)  # type: ignore[assignment]
    del head.layer_heads[0][3]
    files = checkpoints(tmp_path, {"head": head, "codec": original.ActionRFSQAE(True)})
    message = refused(folder, tmp_path / "out" / "bundle", chunk=original.T, **files)
    assert message.startswith(f"{tmp_path / 'head.pt'} ")


def test_an_existing_bundle_is_left_alone(folder: Path, bundle_copy: Path) -> None:
    assert "exists; choose another path" in refused(folder, bundle_copy)


def run(*arguments: object) -> Result:
    return rsd_trt(*arguments)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = ("--backbone", folder, "--preset", "openvla-oft", "--statistics", DATA)
    result = run("pack", *options, "-o", out, "--json")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert (made["parts"], made["statistics"], made["not_read"]) == (["backbone", "head"], DATA, [])
    assert made["bytes"] == sum((folder / shard).stat().st_size for shard in SHARDS)
    assert [line.rpartition("/")[2] for line in result.stderr.splitlines()] == SHARDS
    shown = run("info", out).stdout
    for text in ("weights in", "openvla", DATA, "control.prompt", "control.resize", "resize-naive"):
        assert text in shown
    described = json.loads(run("info", out, "--json", "--hash").stdout)["parts"]["backbone"]
    assert [Path(file["path"]).name for file in described["files"]] == ["backbone.safetensors", *SHARDS]
    assert described["bytes"] == sum(file["bytes"] for file in described["files"])
    again = run("pack", *options, "-o", out)
    assert (again.exit_code, again.stdout) == (1, "")
    plain = run("pack", *options, "-o", tmp_path / "other")
    assert "referenced: 0.01 GB of backbone weights in" in plain.stdout
    assert (
        "assumed: prompt 'In: What action should the robot take to {instruction}?\\nOut:', lower case; cameras "
        in plain.stdout
    )
    assert "attention bidirectional (rsd-trt info" in plain.stdout


def test_conventions_are_options(folder: Path, tmp_path: Path) -> None:
    """The original experiment's later heads: OpenVLA's prompt, rotated images of two cameras, an inverted gripper."""
    cameras = "agentview_image,robot0_eye_in_hand_image"
    conventions = ("--prompt", "openvla", "--cameras", cameras, "--rotate-images", "--gripper", "openvla")
    head = checkpoints(tmp_path, {"head": original.ConditionedRFSQHead(), "codec": original.ActionRFSQAE(True)})
    parts = ("--head", head["head"], "--codec", head["codec"], "--chunk", original.T)
    made = run("pack", "--backbone", folder, "--preset", "rvq", *parts, *conventions, "-o", tmp_path / "b")
    assert made.exit_code == 0, made.output
    control = Bundle.open(tmp_path / "b").config.control
    assert (control.prompt, control.lowercase, control.suffix_token) == (ControlConfig().prompt, True, None)
    assert (control.cameras, control.rotate_images) == (tuple(cameras.split(",")), True)
    assert (control.rotation, control.gripper) == ("shortest", "openvla")
    assert f"cameras {cameras.replace(',', ', ')}; images rotated by 180 degrees" in made.stdout
    bare = run("pack", "--backbone", folder, "--preset", "rvq", "--prompt", "do it", "-o", tmp_path / "c")
    assert (bare.exit_code, "--prompt 'do it' lacks {instruction}" in bare.stderr) == (1, True)


def test_without_a_head_the_way_out_is_told(folder: Path, tmp_path: Path) -> None:
    made = run("pack", "--backbone", folder, "--preset", "openvla", "--statistics", DATA, "-o", tmp_path / "b")
    assert "OpenVLA's own action tokens (greedy decoding) are not read" in made.stdout
    with pytest.raises(UserError, match=r"has no head: .* Pack it with one: --head, or OpenVLA-OFT's folder"):
        Policy.load(tmp_path / "b", "baseline")
