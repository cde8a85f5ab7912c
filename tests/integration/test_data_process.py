"""Stage 1 on real photos and the tiny model: what it stores, what it reuses, what it refuses."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_caches import assert_refused, assert_same, num_committed, read_all, truncate_jpeg

from cache_store.journal import read_notes
from cache_store.reader import BatchReader
from cache_store.store import Cache
from diffsynth_pipe.data.images import ImageInput
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.modeling.disk_offload import load_offloaded
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan, plan_data_process

SEVERAL_COMMITS = 3
EMPTY_CAPTION = 1
"""Beside the records of the rows each cache has the text of the empty caption."""


def test_cached_fields_are_those_of_the_diffusers_pipeline(run_config, tiny_repo, photos):
    from diffusers import QwenImageEditPipeline, QwenImagePipeline

    config = run_config()
    result = data_process(config)
    assert result.state == "Completed"
    assert result.summary["encoded"] == {"text": 5 + EMPTY_CAPTION, "latents": 6}

    # The text-to-image pipeline only decodes; the edit pipeline shows how latents are normalised.
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, transformer=None, dtype=torch.float32)
    pipe.latent_channels = pipe.vae.config.z_dim
    snapshot = Cache.open(config.cache_dir).latest()
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    rows = [line.split(",", 1) for line in (photos / "metadata.csv").read_text("utf-8").splitlines()[1:]]
    assert len(rows) == len(snapshot) == 6
    for index, (name, prompt) in enumerate(rows):
        batch = reader.read([index])
        prompt_emb, _ = pipe.encode_prompt(prompt.strip('"').replace('""', '"'))
        expected = prompt_emb[0].to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(batch.fields["prompt_emb"][0], expected)

        height, width = (8 * size for size in batch.fields["latents"].shape[-2:])
        pixels = fit(Image.open(photos / name).convert("RGB"), height, width)
        latents = QwenImageEditPipeline._encode_vae_image(
            pipe, pipe.image_processor.preprocess(pixels)[:, :, None], None
        )
        expected = latents[0].to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(batch.fields["latents"][0], expected)


def fit(image, height, width):
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def test_a_second_run_is_cached_and_imports_no_torch(run_config, run_file):
    data_process(run_config())
    script = (
        "import sys; from diffsynth_pipe.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    second = subprocess.run(
        [sys.executable, "-c", script, "data-process", str(run_file())], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 0, second.stderr
    assert "data_process: Cached" in second.stdout


def test_kill_9_loses_only_what_was_in_flight(run_config, run_file, tmp_path):
    whole = run_config(cache_path=str(tmp_path / "whole"))
    data_process(whole)

    config = run_config(cache_commit_seconds=0)
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "data-process", str(run_file(cache_commit_seconds=0))]
    writer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while writer.poll() is None and num_committed(config.cache_dir) < SEVERAL_COMMITS:
        pass
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    committed = num_committed(config.cache_dir)
    assert SEVERAL_COMMITS <= committed < 11
    assert plan_data_process(config).verdict == "resume"

    result = data_process(config)
    assert result.state == "Resumed"
    assert sum(result.summary["encoded"].values()) == 11 + EMPTY_CAPTION - committed
    assert_same(read_all(config.cache_dir), read_all(whole.cache_dir))


def test_a_snapshot_whose_sealer_was_killed_is_sealed(run_config):
    config = run_config()
    data_process(config)
    seal = config.cache_dir / "snapshots" / "000001.seal"
    sealed = seal.read_bytes()
    seal.unlink()
    assert plan_data_process(config).why == "snapshot 1 lacks its seal"
    again = data_process(config)
    assert (again.state, again.summary["encoded"]) == ("Resumed", {})
    assert seal.read_bytes() == sealed
    assert plan_data_process(config).verdict == "hit"


def test_workers_decode_at_the_same_time(run_config, monkeypatch):
    """Each of the six photos waits for another one that is being decoded."""
    together = threading.Barrier(2, timeout=60)
    load = ImageInput.load

    def load_with_another(image):
        together.wait()
        return load(image)

    monkeypatch.setattr(ImageInput, "load", load_with_another)
    assert data_process(run_config(dataset_num_workers=2)).summary["encoded"]["latents"] == 6


def test_records_are_committed_as_often_as_asked(run_config, tmp_path):
    for seconds, num_segments in ((0, 12), (600, 1)):
        config = run_config(cache_commit_seconds=seconds, cache_path=str(tmp_path / f"cache-{seconds}"))
        data_process(config)
        assert len(list((config.cache_dir / "segments").iterdir())) == num_segments


def test_a_new_cache_has_the_format_that_was_asked_for(run_config, photos):
    from webdataset import WebDataset

    config = run_config(cache_backend="webdataset")
    data_process(config)
    shards = sorted(map(str, config.cache_dir.glob("segments/*/latents-*.tar")))
    assert len({sample["__key__"] for sample in WebDataset(shards, shardshuffle=False)}) == 6


def test_only_what_changed_is_encoded_again(run_config, edit_rows, photos):
    config = run_config()
    data_process(config)

    def recaption(rows):
        rows[0]["prompt"] += ", at night"

    edit_rows(recaption)
    assert data_process(config).summary["encoded"] == {"text": 1}

    def rename(rows):
        (photos / rows[1]["image"]).rename(photos / "renamed.jpg")
        rows[1]["image"] = "renamed.jpg"

    edit_rows(rename)
    assert data_process(config).summary["encoded"] == {}

    assert data_process(run_config(max_pixels=2048)).summary["encoded"] == {"latents": 6}


def test_two_processes_share_the_work_without_a_barrier(run_config, run_file, tmp_path, monkeypatch):
    config = run_config()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = data_process(config)
    assert "other processes" in first.summary["why"]
    assert Cache.open(config.cache_dir).latest() is None
    monkeypatch.setenv("RANK", "0")
    second = data_process(config)
    assert sum(second.summary["encoded"].values()) + num_records(first) == 11 + EMPTY_CAPTION
    assert len(Cache.open(config.cache_dir).latest()) == 6


def test_truncated_captions_are_told_also_after_a_kill(run_config, run_file, edit_rows, cli):
    def lengthen(rows):
        rows[2]["prompt"] = rows[3]["prompt"] = "0" * 5000

    edit_rows(lengthen)
    config = run_config(cache_commit_seconds=0)
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "data-process", str(run_file(cache_commit_seconds=0))]
    writer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while writer.poll() is None and not read_notes(config.cache_dir):
        pass
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert Cache.open(config.cache_dir).latest() is None

    for state in ("Resumed", "Cached"):
        again = cli("data-process", run_file())
        assert f"data_process: {state}" in again.stdout, again.stderr
        (warning,) = [line for line in again.stderr.splitlines() if line.startswith("notes: ")]
        assert warning.startswith("notes: 2, first ")
        # 5000 digits and five tokens of the template, of which 4096 are encoded
        assert ": text truncated, 909 of 5005 tokens were cut off; " in warning
    described = cli("cache", "info", config.cache_dir).stdout.splitlines()
    snapshot = Cache.open(config.cache_dir).latest()
    assert described[described.index("notes       2") + 1 :] == [
        f"  {snapshot.sample_id(row)}  {snapshot.source(row)}  text: truncated, 909 of 5005 tokens were cut off"
        for row in (2, 3)
    ]


def num_records(result):
    return sum(result.summary["encoded"].values())


def missing_image(rows):
    rows[4]["image"] = "nowhere.jpg"


def missing_column(rows):
    return [{"image": row["image"], "text": row["prompt"]} for row in rows]


@pytest.mark.parametrize(
    ("change", "words"), [(missing_image, ("nowhere.jpg", "row 5")), (missing_column, ("'prompt'", "metadata.csv"))]
)
def test_bad_metadata_leaves_no_cache(cli, run_file, run_config, edit_rows, change, words):
    edit_rows(change)
    assert_refused(cli("data-process", run_file()), *words)
    assert not run_config().cache_dir.exists()


def test_empty_metadata_leaves_no_cache(cli, run_file, run_config, photos):
    (photos / "metadata.csv").write_text("image,prompt\n", encoding="utf-8")
    assert_refused(cli("data-process", run_file()), "metadata.csv")
    assert not run_config().cache_dir.exists()


def test_a_truncated_jpeg_is_named_and_costs_nothing_else(cli, run_file, run_config, photos):
    name = truncate_jpeg(photos)
    assert_refused(cli("data-process", run_file()), name, "row 3")
    assert Cache.open(run_config().cache_dir).latest() is None
    assert num_committed(run_config().cache_dir) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_row_that_cannot_be_encoded_is_named(cli, run_file, edit_rows):
    def on_cuda(rows):
        drawn = {"seed": 1, "num_inference_steps": 4, "cfg_scale": 1}
        return [{**row, **drawn, "rand_device": "cuda" if row is rows[2] else "cpu"} for row in rows]

    edit_rows(on_cuda)
    distill = run_file(
        task="direct_distill:data_process", extra_inputs="seed,rand_device,num_inference_steps,cfg_scale"
    )
    assert_refused(cli("data-process", distill), "row 3", "rand_device")


def test_parameters_are_refused_before_anything_is_read(cli, run_file, run_config):
    assert_refused(cli("data-process", run_file(lora_rnak=4)), "lora_rnak", "lora_rank")
    assert_refused(cli("data-process", run_file(lora_rank=0)), "lora_rank", "0")
    assert_refused(cli("data-process", run_file(fp8_models="x")), "fp8_models", "is no entry of the models")
    assert not run_config().cache_dir.exists()


def test_a_missing_model_file_is_named(cli, run_file, run_config, model_ids):
    ids = model_ids("text_encoder", "vae").replace("vae/diffusion_pytorch_model", "vae/absent")
    assert_refused(cli("data-process", run_file(model_id_with_origin_paths=ids)), "vae/absent.safetensors")
    assert not run_config().cache_dir.exists()


def test_an_encoder_that_yields_nan_is_refused(cli, run_file, run_config, tiny_repo, tmp_path, monkeypatch, model_ids):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "models" / "tiny" / "Qwen-Image"
    shutil.copytree(tiny_repo, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    assert_refused(cli("data-process", run_file()), "latents", "row 1")


def test_the_demo_cache_is_little_more_than_its_tensors(run_config):
    demo = Path(__file__).parents[2] / "deploy" / "demo"
    summary = data_process(
        run_config(dataset_base_path=str(demo), dataset_metadata_path=str(demo / "metadata.csv"), max_pixels=65536)
    ).summary
    # Counted apart from the store: bf16 latents of every size, and the tokens of every distinct caption.
    assert summary["num_samples"] == 18
    assert summary["num_records"] == 18 + 17 + EMPTY_CAPTION
    sizes = [(name.split("x"), count) for name, count in summary["buckets"].items()]
    latents_bytes = sum(2 * 16 * int(height) * int(width) // 64 * count for (height, width), count in sizes)
    assert 0 < summary["payload_bytes"] - latents_bytes < 17 * 2 * 64 * 100
    assert summary["disk_bytes"] <= 1.05 * summary["payload_bytes"]


@pytest.mark.parametrize(("parameter", "method"), [("fp8_models", ""), ("quant_options", ":bitsandbytes_nf4")])
def test_an_encoder_held_in_fewer_bits_makes_records_of_its_own_and_leaves_the_others(
    run_config, model_ids, parameter, method
):
    encoded = data_process(run_config()).summary["encoded"]
    held = run_config(**{parameter: model_ids("text_encoder") + method})
    result = data_process(held)
    assert result.summary["encoded"] == {"text": encoded["text"]}
    assert data_process(run_config()).summary["encoded"] == {}
    assert data_process(held).summary["encoded"] == {}


def test_encoders_with_their_weights_on_the_disk_make_the_same_records_under_the_same_keys(
    run_config, model_ids, tmp_path, monkeypatch
):
    plain = run_config()
    data_process(plain)
    built = []

    def watched(*args):
        built.append(load_offloaded(*args))
        return built[-1]

    monkeypatch.setattr("diffsynth_pipe.modeling.loading.load_offloaded", watched)
    offload = {"offload_models": model_ids("text_encoder", "vae")}
    assert plan_data_process(run_config(**offload)).verdict == "hit"
    offloaded = run_config(**offload, cache_path=str(tmp_path / "offloaded"))
    data_process(offloaded)
    assert [type(model).__name__ for model in built] == ["Qwen2_5_VLForConditionalGeneration", "AutoencoderKLQwenImage"]
    assert {parameter.device.type for model in built for parameter in model.parameters()} == {"meta"}
    assert_same(read_all(offloaded.cache_dir), read_all(plain.cache_dir))


@pytest.mark.parametrize(("name", "trained"), [("dit", {}), ("text_encoder", {"trainable_models": "text_encoder"})])
def test_an_offloaded_model_of_the_training_step_is_refused(run_config, model_ids, name, trained):
    config = run_config(offload_models=model_ids(name), **trained)
    data_process(config)  # which does not load it
    with pytest.raises(ConfigError, match=rf"^offload_models: names the {name}, whose weights training needs") as error:
        plan(config)
    assert "\n" not in str(error.value)
