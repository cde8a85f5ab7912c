"""Stage 2 from a sealed cache: what it opens, what it refuses, and that finished work is left alone."""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

from diffsynth_pipe.errors import PipeError
from diffsynth_pipe.launch import launch_data_process, launch_train
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan_train

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


class OpenWatcher:
    """Records the folders in which any process opens a file, by inotify."""

    def __init__(self, *folders):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        self._folders = {
            self._libc.inotify_add_watch(self._fd, os.fsencode(folder), IN_OPEN): folder for folder in folders
        }
        assert len(self._folders) == len(folders)
        assert min(self._folders) > 0

    def opened(self):
        """Return the files that were opened since the last call."""
        files = set()
        try:
            while data := os.read(self._fd, 1 << 16):
                while data:
                    watch, _, _, length = EVENT.unpack_from(data)
                    name = data[EVENT.size : EVENT.size + length].rstrip(b"\0").decode()
                    files.add(self._folders[watch] / name)
                    data = data[EVENT.size + length :]
        except BlockingIOError:
            return files

    def close(self):
        os.close(self._fd)


def test_train_opens_the_denoiser_and_the_cache_and_nothing_else(run_config, run_file, photos, tiny_repo):
    config = run_config()
    data_process(config)
    forbidden = [photos, *(tiny_repo / name for name in ("text_encoder", "tokenizer", "vae"))]
    watcher = OpenWatcher(*forbidden, tiny_repo / "transformer", config.cache_dir / "snapshots")
    try:
        command = [sys.executable, "-m", "diffsynth_pipe.train", "--config", str(run_file(task="sft:train"))]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
        opened = watcher.opened()
    finally:
        watcher.close()
    assert tiny_repo / "transformer" / "diffusion_pytorch_model.safetensors" in opened
    assert config.cache_dir / "snapshots" / "000001.npz" in opened
    assert not [path for path in opened if path in forbidden or path.parent in forbidden]


def test_a_finished_run_is_not_trained_again_unless_forced(run_config, run_file, cli):
    data_process(run_config())
    first = cli("train", run_file())
    assert first.returncode == 0, first.stderr
    assert "train: Completed" in first.stdout
    run_dir = plan_train(run_config(task="sft:train")).path
    lora = run_dir / json.loads((run_dir / "run.json").read_text("utf-8"))["lora_path"]
    trained = lora.stat()

    second = cli("train", run_file())
    assert "train: Cached" in second.stdout
    assert lora.stat().st_mtime_ns == trained.st_mtime_ns

    forced = cli("train", run_file(), "--force")
    assert "train: Completed" in forced.stdout, forced.stderr
    assert lora.stat().st_mtime_ns > trained.st_mtime_ns


def test_the_stages_hand_over_as_in_the_reference(run_config, tmp_path):
    """``output_path`` of the first command is ``dataset_base_path`` of the second."""
    cache_dir = tmp_path / "handed-over"
    encoded = launch_data_process(run_config(task="sft:data_process", cache_path=None, output_path=str(cache_dir)))
    assert (encoded.state, encoded.path) == ("Completed", cache_dir)
    parameters = {"task": "sft:train", "cache_path": None, "dataset_metadata_path": None}
    trained = launch_train(run_config(**parameters, dataset_base_path=str(cache_dir)))
    assert trained.state == "Completed"
    assert (trained.path / trained.summary["lora_path"]).is_file()
    assert trained.summary["engine"] == "engine plain torch, world size 1, compute float32"  # of the run's own file


def test_another_rank_trains_beside_the_first_run(run_config):
    config = run_config()
    data_process(config)
    assert plan_train(config).path != plan_train(run_config(lora_rank=8)).path


def assert_refused(finished, *words):
    assert finished.returncode == 2, finished.stdout + finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    for word in words:
        assert word in errors[0]


def test_train_without_a_cache(run_config, run_file, cli):
    assert_refused(cli("train", run_file()), "is not a cache", "data-process")
    assert not run_config().cache_dir.exists()


def test_what_cannot_be_launched_is_refused(run_config, tmp_path, monkeypatch):
    data_process(run_config())
    (tmp_path / "list.yaml").write_text("- use_cpu")
    (tmp_path / "cut.yaml").write_text("use_cpu: [")
    monkeypatch.chdir(tmp_path)
    for name, value, message in (
        ("accelerate_config_file", "absent.yaml", "accelerate_config_file: absent.yaml cannot be read: .*No such file"),
        ("accelerate_config_file", "list.yaml", "accelerate_config_file: list.yaml holds no settings; see"),
        ("accelerate_config_file", "cut.yaml", "accelerate_config_file: cut.yaml cannot be read: .*expected"),
        ("output_path", "list.yaml/out", r"list.yaml/out/train-\w+: .*Not a directory"),
    ):
        with pytest.raises(PipeError, match=f"^{message}"):
            launch_train(run_config(**{name: value}, cache_path=str(run_config().cache_dir)))


def test_train_from_the_cache_of_another_model(run_config, run_file, cli, tiny_repo, tmp_path, monkeypatch):
    data_process(run_config())
    other = tmp_path / "models" / "tiny" / "Qwen-Image"
    shutil.copytree(tiny_repo, other)
    path = other / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "joint_attention_dim": 96}), "utf-8")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    assert_refused(cli("train", run_file()), "prompt_emb", "64", "96")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_target_modules": "to_q,to_qq"}, ("to_qq", "matches no module")),
        ({"model_id_with_origin_paths": "tiny/Qwen-Image:transformer/nothing*.safetensors"}, ("nothing*.safetensors",)),
    ],
)
def test_train_with_wrong_parameters(run_config, run_file, cli, changes, words):
    data_process(run_config())
    assert_refused(cli("train", run_file(**changes)), *words)
