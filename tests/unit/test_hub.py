import builtins
import dataclasses
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from diffsynth_pipe.config import RunConfig
from diffsynth_pipe.contracts import ComponentSpec, Quantization
from diffsynth_pipe.errors import ConfigError, ModelError, ModelFileMissing
from diffsynth_pipe.fingerprint import component_digest
from diffsynth_pipe.hub import resolve_components

FAMILY = SimpleNamespace(
    components={
        "text_encoder": ComponentSpec(
            subfolder="text_encoder", class_name="TextModel", load=print, companions=("tokenizer",)
        ),
        "vae": ComponentSpec(subfolder="vae", class_name="Autoencoder", load=print),
        "dit": ComponentSpec(subfolder="transformer", class_name="Denoiser", load=print),
    },
    pipelines=("SomePipeline",),
)
BY_ID = (
    "org/model:transformer/diffusion_pytorch_model*.safetensors,org/model:text_encoder/model*.safetensors,"
    "org/model:vae/diffusion_pytorch_model.safetensors"
)
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


TEMPLATE = {"trust_remote_code": True, "extra_inputs": "template_inputs"}
EMPTY = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without a tensor."""


def write(path, content=EMPTY):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository of files without weights in them: only their headers are read."""
    repo = tmp_path / "models" / "org" / "model"
    write(repo / "text_encoder/config.json", {"architectures": ["TextModel"]})
    write(repo / "text_encoder/model.safetensors")
    write(repo / "tokenizer/vocab.json", {})
    write(repo / "vae/config.json", {"_class_name": "Autoencoder"})
    write(repo / "vae/diffusion_pytorch_model.safetensors")
    write(repo / "transformer/config.json", {"_class_name": "Denoiser"})
    for shard in SHARDS:
        write(repo / "transformer" / shard)
    index = {"weight_map": {f"layer.{i}": shard for i, shard in enumerate(SHARDS * 2)}}
    write(repo / "transformer/diffusion_pytorch_model.safetensors.index.json", index)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    monkeypatch.chdir(tmp_path)
    return repo


def resolve(*names, **parameters):
    return resolve_components(RunConfig(dataset_base_path=".", **parameters), FAMILY, names)


def test_by_id(repo):
    found = resolve("dit", "vae", "text_encoder", model_id_with_origin_paths=BY_ID)
    assert list(found) == ["dit", "vae", "text_encoder"]
    assert found["dit"].folder == repo / "transformer"
    assert found["dit"].weights == tuple(repo / "transformer" / shard for shard in SHARDS)
    assert found["dit"].companions == {}
    assert found["vae"].weights == (repo / "vae/diffusion_pytorch_model.safetensors",)
    assert found["text_encoder"].companions == {"tokenizer": repo / "tokenizer"}


def test_all_files_of_a_template_model_are_its_code_or_weights(tmp_path):
    for name in (
        "__init__.py",
        "model.py",
        "words/list.txt",
        "model.safetensors",
        "__pycache__/model.pyc",
        ".git/HEAD",
    ):
        write(tmp_path / name)
    files = resolve("template_model", template_model_id_or_path=str(tmp_path), **TEMPLATE)["template_model"]
    assert files.weights == (tmp_path / "model.safetensors",)
    assert files.code == tuple(tmp_path / name for name in ("__init__.py", "model.py", "words/list.txt"))


def test_by_path_gives_the_same_files(repo):
    paths = [
        [f"models/org/model/transformer/{shard}" for shard in reversed(SHARDS)],
        "models/org/model/text_encoder/model.safetensors",
        "models/org/model/vae/diffusion_pytorch_model.safetensors",
    ]
    by_path = resolve(*FAMILY.components, model_paths=json.dumps(paths))
    assert by_path == resolve(*FAMILY.components, model_id_with_origin_paths=BY_ID)


SHARDED = [f"models/org/model/transformer/{shard}" for shard in SHARDS]
VAE_ID = "org/model:vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("fp8_models", "held"),
    [(VAE_ID, {"vae"}), (json.dumps([SHARDED]), {"dit"}), (json.dumps([SHARDED, VAE_ID]), {"dit", "vae"})],
)
def test_fp8_models_repeats_entries(repo, fp8_models, held):
    ids = f"{VAE_ID},org/model:text_encoder/model*.safetensors"
    parameters = {"model_paths": json.dumps([SHARDED]), "model_id_with_origin_paths": ids}
    found = resolve(*FAMILY.components, **parameters, fp8_models=fp8_models)
    assert {name for name, files in found.items() if files.fp8} == held


@pytest.mark.parametrize("fp8_models", ["dit", "org/model:vae/*", json.dumps([SHARDED[:2]]), SHARDED[0]])
def test_fp8_models_that_is_no_entry_is_refused(repo, fp8_models):
    with pytest.raises(
        ConfigError, match=r"^fp8_models: .* is no entry of the models; they are .*transformer"
    ) as error:
        resolve("dit", model_paths=json.dumps([SHARDED]), fp8_models=fp8_models)
    assert "\n" not in str(error.value)


def test_quant_options_repeat_entries(repo):
    ids = f"{VAE_ID},org/model:text_encoder/model*.safetensors"
    parameters = {"model_paths": json.dumps([SHARDED]), "model_id_with_origin_paths": ids}
    options = f"{VAE_ID}:bitsandbytes_fp4/a.1,b; {json.dumps(SHARDED)}:bitsandbytes_nf4;"
    found = resolve(*FAMILY.components, **parameters, quant_options=options)
    assert {name: files.quantization for name, files in found.items()} == {
        "dit": Quantization(method="bitsandbytes_nf4"),
        "vae": Quantization(method="bitsandbytes_fp4", excluded=("a.1", "b")),
        "text_encoder": None,
    }
    plain = resolve(*FAMILY.components, **parameters)
    vae = plain["vae"]
    held = [
        vae,
        found["vae"],
        dataclasses.replace(vae, fp8=True),
        dataclasses.replace(vae, quantization=found["dit"].quantization),
    ]
    assert len(set(map(component_digest, held))) == len(held)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quant_options": "vae:bitsandbytes_nf4"}, "quant_options: 'vae' is no entry of the models; they are "),
        (
            {"quant_options": f"{VAE_ID}:bitsandbytes_nf4;{VAE_ID}:bitsandbytes_fp4"},
            f"quant_options: '{VAE_ID}' is named by quant_options already; name it once",
        ),
        (
            {"quant_options": f"{VAE_ID}:bitsandbytes_nf4", "fp8_models": VAE_ID},
            f"quant_options: '{VAE_ID}' is named by fp8_models already; name it once",
        ),
    ],
)
def test_quant_options_that_lead_nowhere_are_refused(repo, parameters, message):
    with pytest.raises(ConfigError) as error:
        resolve("vae", model_id_with_origin_paths=VAE_ID, **parameters)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_quant_options_say_what_to_install(repo, monkeypatch):
    monkeypatch.setattr("diffsynth_pipe.hub.find_spec", {}.get)
    with pytest.raises(
        ConfigError, match=r"^quant_options: the extra quant is not installed; pip install 'diffs"
    ) as error:
        resolve("vae", model_id_with_origin_paths=VAE_ID, quant_options=f"{VAE_ID}:bitsandbytes_nf4")
    assert "\n" not in str(error.value)


def test_both_ways_can_be_mixed_and_an_existing_path_wins(repo):
    shards = [[f"models/org/model/transformer/{shard}" for shard in SHARDS]]
    text_encoder = BY_ID.split(",")[1]
    found = resolve("text_encoder", "dit", model_paths=json.dumps(shards), model_id_with_origin_paths=text_encoder)
    assert found == resolve("text_encoder", "dit", model_id_with_origin_paths=BY_ID)
    path = "models/org/model/vae/diffusion_pytorch_model.safetensors"
    found = resolve("dit", "vae", model_paths=[path], model_id_with_origin_paths=BY_ID.partition(",")[0])
    assert set(found) == {"dit", "vae"}
    odd = repo.parent / "a:b" / "vae"
    odd.parent.mkdir()
    (repo / "vae").rename(odd)
    file = odd / "diffusion_pytorch_model.safetensors"
    assert resolve("vae", model_id_with_origin_paths=str(file))["vae"].weights == (file,)


def test_offload_models_repeats_entries_and_leaves_digests_alone(repo):
    first, second, _ = BY_ID.split(",")
    shards = [f"models/org/model/transformer/{shard}" for shard in SHARDS]
    models = {"model_paths": [shards], "model_id_with_origin_paths": f"{second},{VAE_ID}"}
    found = resolve(*FAMILY.components, offload_models=json.dumps([shards, second]), **models)
    assert {name: files.offload for name, files in found.items()} == {"text_encoder": True, "vae": False, "dit": True}
    assert component_digest(found["dit"]) == component_digest(dataclasses.replace(found["dit"], offload=False))
    with pytest.raises(
        ConfigError, match=r"offload_models: 'org/model:transformer/.*' is no entry of the models; they"
    ):
        resolve("dit", offload_models=f"{second},{first}", **models)


@pytest.mark.parametrize("other", [{"fp8_models": VAE_ID}, {"quant_options": f"{VAE_ID}:bitsandbytes_nf4"}])
def test_weights_left_on_the_disk_cannot_be_held_in_fewer_bits(repo, other):
    (name,) = other
    with pytest.raises(ConfigError) as error:
        resolve("vae", model_id_with_origin_paths=VAE_ID, offload_models=VAE_ID, **other)
    assert str(error.value) == f"offload_models: {VAE_ID!r} is named by {name} already; name it once"


def test_the_default_place_is_models(repo, monkeypatch):
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH")
    assert resolve("vae", model_id_with_origin_paths=BY_ID)["vae"].folder == repo / "vae"


def test_nothing_of_other_components_is_looked_at(repo, monkeypatch):
    (repo / "vae").rename(repo / "gone")
    seen = []

    def watched(function):
        def call(path, *args, **kwargs):
            seen.append(os.fspath(path) if not isinstance(path, int) else "")
            return function(path, *args, **kwargs)

        return call

    for module, name in (
        (os, "stat"),
        (os, "scandir"),
        (os, "listdir"),
        (os, "lstat"),
        (io, "open"),
        (builtins, "open"),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    paths = [str(repo / "vae/diffusion_pytorch_model.safetensors")]
    resolve("dit", model_id_with_origin_paths=BY_ID.rpartition(",")[0], model_paths=paths)
    monkeypatch.undo()
    assert any("transformer" in path for path in seen), "the watch saw nothing"
    assert not [path for path in seen if any(name in path for name in ("vae", "text_encoder", "tokenizer"))]


def test_a_folder_of_another_name_is_known_by_its_config(repo):
    (repo / "transformer").rename(repo / "my-denoiser")
    text = "org/model:my-denoiser/diffusion_pytorch_model*.safetensors"
    assert resolve("dit", model_id_with_origin_paths=text)["dit"].folder == repo / "my-denoiser"
    with pytest.raises(ModelFileMissing, match=r"names the vae \(Autoencoder\).*my-denoiser.* is a 'Denoiser'"):
        resolve("vae", model_id_with_origin_paths=text)


def test_the_family_that_trains_a_model_is_named(repo):
    write(repo / "transformer/config.json", {"_class_name": "QwenImageTransformer2DModel"})
    message = r"holds a 'QwenImageTransformer2DModel', expected a 'Denoiser'; set family to qwen_image_edit, or name"
    with pytest.raises(ModelError, match=message):
        resolve("dit", model_id_with_origin_paths=BY_ID)


def test_a_denoiser_of_a_repository_of_another_family_is_refused(repo):
    write(repo / "model_index.json", {"_class_name": "QwenImageEditPlusPipeline"})
    message = (
        r"is a QwenImageEditPlusPipeline, but family 'qwen_image' trains SomePipeline; set family to qwen_image_edit,"
    )
    with pytest.raises(ModelError, match=message):
        resolve("dit", model_id_with_origin_paths=BY_ID)
    assert resolve("vae", model_id_with_origin_paths=BY_ID)["vae"].folder == repo / "vae"
    for pipeline in ("SomePipeline", "PipelineOfOnesOwn"):
        write(repo / "model_index.json", {"_class_name": pipeline})
        assert resolve("dit", model_id_with_origin_paths=BY_ID)["dit"].folder == repo / "transformer"


def test_processor_path_overrides_the_sibling(repo, tmp_path, monkeypatch):
    encoder = dataclasses.replace(FAMILY.components["text_encoder"], companions=("tokenizer", "processor"))
    monkeypatch.setitem(FAMILY.components, "text_encoder", encoder)
    with pytest.raises(ModelFileMissing, match="processor does not exist"):
        resolve("text_encoder", model_id_with_origin_paths=BY_ID)
    (tmp_path / "patches").mkdir()
    found = resolve("text_encoder", model_id_with_origin_paths=BY_ID, processor_path="patches")
    assert found["text_encoder"].companions == {"tokenizer": repo / "tokenizer", "processor": tmp_path / "patches"}


def test_tokenizer_path_overrides_the_sibling(repo, tmp_path):
    (repo / "tokenizer").rename(tmp_path / "words")
    with pytest.raises(ModelFileMissing, match="tokenizer does not exist"):
        resolve("text_encoder", model_id_with_origin_paths=BY_ID)
    found = resolve("text_encoder", model_id_with_origin_paths=BY_ID, tokenizer_path="words")
    assert found["text_encoder"].companions == {"tokenizer": tmp_path / "words"}
    with pytest.raises(ConfigError, match=r"^tokenizer_path: 'nowhere' is neither a folder nor 'MODEL_ID:' nor"):
        resolve("text_encoder", model_id_with_origin_paths=BY_ID, tokenizer_path="nowhere")


def test_audio_processor_path_must_hold_a_processor(repo, tmp_path):
    options = {"model_id_with_origin_paths": BY_ID, "family": "wan", "audio_processor_path": "wav2vec"}
    with pytest.raises(ConfigError, match=r"^audio_processor_path: 'wav2vec' is neither a folder nor 'MODEL_ID:' nor"):
        resolve("text_encoder", **options)
    (tmp_path / "wav2vec").mkdir()
    with pytest.raises(ConfigError, match=r"^audio_processor_path: wav2vec has no preprocessor_config"):
        resolve("text_encoder", **options)
    (tmp_path / "wav2vec" / "preprocessor_config.json").write_text("{}")
    found = resolve("text_encoder", **options)
    assert found == resolve("text_encoder", **{**options, "audio_processor_path": "org/model:not/here/"})
    assert found == resolve("text_encoder", model_id_with_origin_paths=BY_ID)


def test_the_tokenizers_of_flux_have_paths_of_their_own(repo, tmp_path, monkeypatch):
    encoder = dataclasses.replace(FAMILY.components["text_encoder"], companions=("tokenizer", "tokenizer_2"))
    monkeypatch.setitem(FAMILY.components, "text_encoder", encoder)
    for folder in ("words", "pieces"):
        (tmp_path / folder).mkdir()
    found = resolve(
        "text_encoder", model_id_with_origin_paths=BY_ID, tokenizer_1_path="words", tokenizer_2_path="pieces"
    )
    companions = {"tokenizer": tmp_path / "words", "tokenizer_2": tmp_path / "pieces"}
    assert found["text_encoder"].companions == companions
    with pytest.raises(ConfigError, match=r"^tokenizer_2_path: 'nowhere' is neither a folder"):
        resolve("text_encoder", model_id_with_origin_paths=BY_ID, tokenizer_2_path="nowhere")
    with pytest.raises(ValidationError, match="tokenizer_path, tokenizer_1_path: are two names of the same folder"):
        resolve("text_encoder", model_id_with_origin_paths=BY_ID, tokenizer_path="words", tokenizer_1_path="words")


def test_a_folder_that_no_component_of_the_family_takes_is_refused(repo, tmp_path):
    (tmp_path / "pieces").mkdir()
    with pytest.raises(ConfigError, match=r"^tokenizer_2_path: no component of the family takes a tokenizer_2; leave"):
        resolve("vae", model_id_with_origin_paths=BY_ID, tokenizer_2_path="pieces")


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        f"transformer/{SHARDS[1]}",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_an_incomplete_download_is_noticed(repo, name):
    (repo / name).unlink()
    with pytest.raises(ModelFileMissing, match="unset DIFFSYNTH_SKIP_DOWNLOAD to download it") as caught:
        resolve("dit", model_id_with_origin_paths=BY_ID)
    assert name.rpartition("/")[2] in str(caught.value) or "*.safetensors.index.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_matches_nothing(repo):
    with pytest.raises(ModelFileMissing, match=r"no .safetensors file matches 'model\*.safetensors' in .*/vae"):
        resolve("vae", model_id_with_origin_paths="org/model:vae/model*.safetensors")


def test_a_component_that_is_named_nowhere(repo):
    message = (
        r"no model entry names the vae \(Autoencoder\): add 'MODEL_ID:vae/\*.safetensors' to model_id_with_origin_paths"
    )
    with pytest.raises(ModelFileMissing, match=message):
        resolve("dit", "vae", model_id_with_origin_paths=BY_ID.rpartition(",")[0])
    with pytest.raises(ModelFileMissing, match="no model entry names the dit"):
        resolve("dit")


def test_a_component_that_is_named_twice(repo):
    with pytest.raises(ModelError, match=r"2 model entries name the dit: .* keep one"):
        resolve("dit", model_paths=[str(repo / "transformer" / SHARDS[0])], model_id_with_origin_paths=BY_ID)


def test_the_wrong_class(repo):
    write(repo / "vae/config.json", {"_class_name": "OtherAutoencoder"})
    with pytest.raises(ModelError, match="vae: holds a 'OtherAutoencoder', expected a 'Autoencoder'"):
        resolve("vae", model_id_with_origin_paths=BY_ID)


@pytest.mark.parametrize(("content", "message"), [(b"{", "is damaged"), (b"[]", "holds a list"), (b"{}", "holds a ''")])
def test_a_broken_config(repo, content, message):
    write(repo / "vae/config.json", content)
    with pytest.raises(ModelError, match=message):
        resolve("vae", model_id_with_origin_paths=BY_ID)


def test_weights_that_loading_would_not_read(repo):
    (repo / "vae/diffusion_pytorch_model.safetensors").rename(repo / "vae/mine.safetensors")
    with pytest.raises(ModelError, match=r"'mine.safetensors' would not be read"):
        resolve("vae", model_paths=[str(repo / "vae/mine.safetensors")])
    some = [str(repo / "transformer" / shard) for shard in SHARDS[:2]]
    with pytest.raises(ModelError, match=r"names 2 files, but the index of .* lists 3 shards"):
        resolve("dit", model_paths=[some])


def test_a_listed_file_that_is_not_there(repo):
    with pytest.raises(ModelFileMissing, match=r"vae/no.safetensors does not exist; correct the path"):
        resolve("vae", model_paths=["models/org/model/vae/no.safetensors"])


def test_files_of_several_folders_in_one_list(repo):
    files = [str(repo / "vae/diffusion_pytorch_model.safetensors"), str(repo / "text_encoder/model.safetensors")]
    with pytest.raises(ModelError, match="spans several folders"):
        resolve("vae", model_paths=[files])


@pytest.mark.parametrize(
    "text",
    [
        "vae/nowhere.safetensors",
        "org/model:",
        ":vae/x.safetensors",
        "org/model:*/vae/x",
        "org/model:../vae/x",
        "org/model:/vae/x",
    ],
)
def test_a_malformed_entry(repo, text):
    with pytest.raises(ConfigError, match="is neither an existing file nor 'MODEL_ID:FOLDER/PATTERN'"):
        resolve("vae", model_id_with_origin_paths=text)


def test_an_unknown_download_source(repo, monkeypatch):
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "floppy")
    with pytest.raises(ConfigError, match="DIFFSYNTH_DOWNLOAD_SOURCE: 'floppy' is not one of modelscope, huggingface"):
        resolve("dit", model_id_with_origin_paths="org/other:transformer/*.safetensors")
    assert not Path("models/org/other").exists()
