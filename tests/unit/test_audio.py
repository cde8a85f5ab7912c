import wave

import numpy as np
import pytest
from PIL import Image

from diffsynth_pipe.contracts import AUDIO_SAMPLE_RATE as SAMPLE_RATE
from diffsynth_pipe.data.audio import AudioInput, load_audio
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.fingerprint import file_digest


def write(path, samples, rate):
    """Write samples ``[sample, channel]`` in [-1, 1] with 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], 2, rate, len(samples), "NONE", ""))
        file.writeframes((samples * 2**15).round().clip(-(2**15), 2**15 - 1).astype("<i2").tobytes())
    return path


def tone(rate, seconds=1.0):
    return np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


def test_samples_at_the_rate_are_those_of_the_file(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, 1)) / 2**15
    found = load_audio(write(tmp_path / "a.wav", samples, SAMPLE_RATE))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, samples[:, 0].astype(np.float32))


def test_other_rates_are_resampled_and_channels_averaged(tmp_path):
    """A tone at 44.1 kHz, louder on the left than on the right: at 16 kHz, as loud as their mean."""
    both = np.stack([0.8 * tone(44100), 0.4 * tone(44100)], axis=1)
    found = load_audio(write(tmp_path / "a.wav", both, 44100))
    assert abs(len(found) - SAMPLE_RATE) <= 1
    np.testing.assert_allclose(found[200:-200], 0.6 * tone(SAMPLE_RATE)[200 : len(found) - 200], rtol=0, atol=2e-3)


def test_what_is_no_audio_is_refused_in_one_line(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.wav").write_bytes(b"RIFF and then nothing")
    write(tmp_path / "c.wav", tone(SAMPLE_RATE, 0.05)[:, None], SAMPLE_RATE)
    for name, reason in {
        "a.png": "has no audio stream; replace or remove it",
        "b.wav": "is no audio that can be decoded",
        "c.wav": "has 0.05 s of audio, less than 0.1; remove it",
        "d.wav": "does not exist; check dataset_base_path",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            load_audio(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert str(caught.value).count(str(tmp_path)) <= 1 + (name == "b.wav")
        assert "\n" not in str(caught.value)


def test_a_file_that_changed_is_refused(tmp_path):
    path = write(tmp_path / "a.wav", tone(SAMPLE_RATE)[:, None], SAMPLE_RATE)
    audio = AudioInput(path=path, media_digest=file_digest(path), label="row 1")
    assert len(audio.load()) == SAMPLE_RATE
    write(path, tone(SAMPLE_RATE)[:, None] / 2, SAMPLE_RATE)
    with pytest.raises(DataError, match=r"^row 1: .*a.wav: changed since it was listed"):
        audio.load()
    assert AudioInput(path=path, media_digest=file_digest(path), label="").digest != audio.digest
