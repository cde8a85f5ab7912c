"""The published weights of Wan2.2-S2V-14B, whose layers have the names of its authors, as a folder that is loaded."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.durable import fsync_tree, publish_folder
from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

CLASS_NAME = "WanModel_S2V"
ARGUMENTS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "freq_dim": "freq_dim",
    "audio_dim": "audio_dim",
    "audio_inject_layers": "audio_inject_layers",
    "num_audio_tokens": "num_audio_token",
    "pose_dim": "cond_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
"""Arguments of ``WanS2VTransformer3DModel``, and what the original ``config.json`` calls them."""
RENAMED = (
    (r"\bself_attn\.", "attn1."),
    (r"\bcross_attn\.", "attn2."),
    (r"\b([qkv])\.(weight|bias)$", r"to_\1.\2"),
    (r"\bo\.(weight|bias)$", r"to_out.0.\1"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"\bffn\.0\.", "ffn.net.0.proj."),
    (r"\bffn\.2\.", "ffn.net.2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\bmodulation$", "scale_shift_table"),
    (r"^(text|time)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
    (r"^(text|time)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^cond_encoder\.", "condition_embedder.pose_embedder."),
    (r"^casual_audio_encoder\.weights$", "condition_embedder.causal_audio_encoder.weighted_avg.weights"),
    (r"^casual_audio_encoder\.encoder\.(conv[23])\.", r"condition_embedder.causal_audio_encoder.encoder.\1.conv."),
    (r"^casual_audio_encoder\.", "condition_embedder.causal_audio_encoder."),
    (r"^trainable_cond_mask\.", "trainable_condition_mask."),
)
"""Parts of the original names, and what they become, in this order."""


def convert(source: Path, target: Path) -> None:
    """Write the weights of a folder under the names of ``WanS2VTransformer3DModel``, one file at a time.

    Args:
        source: Holds ``config.json`` and ``diffusion_pytorch_model*.safetensors`` as they were published.
        target: A new folder, such as ``.../transformer``.

    Raises:
        ModelError: The source is another model or not whole, or the target is there.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from diffsynth_pipe.modeling.wan_s2v import WanS2VTransformer3DModel

    if target.exists():
        raise ModelError(f"{target}: exists; name a new folder")
    with torch.device("meta"):
        model = WanS2VTransformer3DModel(**_settings(source))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    place: dict[str, str] = {}
    num_bytes = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / target.name
        new.mkdir()
        for path in sorted(source.glob("diffusion_pytorch_model*.safetensors")):
            try:
                tensors = {_renamed(name): tensor for name, tensor in load_file(path).items()}
            except SafetensorError as error:
                raise ModelError(f"{path}: is damaged ({error}); download it again") from error
            for name, tensor in tensors.items():
                if expected.get(name) != tensor.shape:
                    raise ModelError(f"{path}: {name} has shape {list(tensor.shape)}, which config.json does not say")
            save_file(tensors, new / path.name, {"format": "pt"})
            place |= dict.fromkeys(tensors, path.name)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if missing := sorted(expected.keys() - place):
            raise ModelError(f"{source}: lacks {len(missing)} weights, such as {missing[0]}; download it again")
        if len(set(place.values())) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": place}
            (new / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        model.save_config(new)
        fsync_tree(new)
        publish_folder(new, target)


def _settings(source: Path) -> dict[str, Any]:
    """Return the arguments of ``WanS2VTransformer3DModel`` from the original ``config.json``."""
    path = source / "config.json"
    try:
        config: Mapping[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); name the folder of a {CLASS_NAME}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != CLASS_NAME:
        raise ModelError(f"{source}: holds a {found!r}, expected a {CLASS_NAME!r}")
    if not (config.get("zero_timestep") and config.get("enable_adain")):
        raise ModelError(f"{source}: is a {CLASS_NAME} without zero_timestep or enable_adain, which is not implemented")
    try:
        settings = {name: config[original] for name, original in ARGUMENTS.items()}
        settings["attention_head_dim"] = config["dim"] // config["num_heads"]
    except KeyError as error:
        raise ModelError(f"{path}: lacks {error}; download it again") from error
    # The authors' class does not write the channels of the text, which are then those of UMT5-XXL.
    return {"text_dim": config.get("text_dim", 4096), **settings}


def _renamed(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name
