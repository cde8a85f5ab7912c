"""Stops and kills a training at random moments, over and over; its end must be that of one that was left alone.

``python tests/integration/torture_training.py 20`` does it 20 times, by SIGTERM and SIGKILL in turn.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_trainings import FAMILY, write_cache

SETTINGS = {
    "task": "sft:train",
    "lora_base_model": "dit",
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "save_steps": 2,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "lora_dropout": 0.1,
    "num_validation_samples": 2,
    "validation_steps": 10,
}


def start(parameters):
    command = [sys.executable, "-m", "diffsynth_pipe.train"]
    command += [text for name, value in parameters.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(parameters, num_kills, draw):
    """Train to the end; return the contents of ``run.json`` and the steps at which it was stopped."""
    stops = []
    while True:
        process = start(parameters)
        wish = signal.SIGKILL if len(stops) % 2 else signal.SIGTERM
        lines = []
        for line in process.stdout:
            lines.append(line)
            if len(stops) < num_kills and "saved step-" in line:
                threading.Timer(draw.random() * 0.15, process.send_signal, [wish]).start()
        if process.wait() == 0:
            (run_file,) = Path(parameters["output_path"]).glob("train-*/run.json")
            return json.loads(run_file.read_text()), stops
        if process.returncode not in (-wish, 128 + wish):
            sys.exit("".join(lines))
        stops.append((wish.name, re.findall(r"saved (step-\d+)", "".join(lines))[-1]))


def main(num_kills: int) -> None:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        FAMILY.write_tiny(Path(folder) / "tiny")
        weights = Path(folder) / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
        parameters = SETTINGS | {
            "dataset_base_path": str(write_cache(Path(folder) / "cache")),
            "model_paths": json.dumps([str(weights)]),
            "dataset_repeat": 2 * num_kills,
        }
        whole, _ = train(parameters | {"output_path": f"{folder}/whole"}, 0, draw)
        killed, stops = train(parameters | {"output_path": f"{folder}/killed"}, num_kills, draw)
        for name, step in stops:
            print(f"{name} after {step}")
        same = whole["digests"] == killed["digests"] and whole["validation"] == killed["validation"]
        print(f"{len(stops)} stops in {whole['num_steps']} steps: {'the same' if same else 'OTHER'} bytes")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
